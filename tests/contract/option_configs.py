"""Options that the default form of a mechanism doesn't show, for tests of every mechanism."""

from __future__ import annotations

from itertools import product

from subquad.build import mixer_config

CONFIGS = [
    *(mixer_config("aft", kind=kind, window=7, rank=3) for kind in ("full", "local", "simple")),
    *(mixer_config("aft", kind="conv", kernel=kernel, columns=columns) for kernel, columns in ((4, None), (3, 5))),
    *(mixer_config("ngram", n=n) for n in (1, 2)),
    *(
        mixer_config("reformer", chunk=chunk, rounds=rounds, buckets=buckets, dedup=rounds == 3)
        for chunk, rounds, buckets in ((4, 1, None), (7, 2, (2, 4)), (4, 3, 8), (64, 2, 1))
    ),
    *(
        mixer_config("reformer", chunk=4, chunks_before=before, chunks_after=after, wrap=wrap, rounds=1 if wrap else 2)
        for before, after in ((0, 0), (0, 1), (2, 1), (20, 3))
        for wrap in (False, True)
    ),
    *(mixer_config("streaming", sinks=sinks, window=5, learned_sink=True) for sinks in (0, 4)),
    *(
        mixer_config("star", steps=steps, norm=norm, boundary=boundary, start=start, share_steps=steps == 3)
        for steps, norm in product((1, 3), ("post", "pre_official"))
        for boundary, start in (("zero_key", "token"), ("mask", "mean"), ("ring", "padded_mean"))
    ),
    *(
        mixer_config("sparse_transformer", kind=kind, stride=7, summary=3, combine=combine, summary_sets=2)
        for kind, combine in product(("strided", "fixed"), ("merged", "local", "summary", "heads"))
    ),
    *(mixer_config("routing", clusters=2, window=window, shared=shared) for window, shared in ((5, True), (5, None))),
    mixer_config("routing", clusters=3, window=40, shared=False),
    *(
        mixer_config("sinkhorn", block=4, combine=combine, sort_cut=sort_cut)
        for combine, sort_cut in (("sum", None), ("logits", None), ("joint", 2))
    ),
    *(mixer_config("linear", chunk=chunk) for chunk in (1, 5, 100)),
    *(
        mixer_config("performer", kernel=kernel, features=10, chunk=chunk, redraw=1)
        for kernel, chunk in product(("positive", "hyperbolic", "trigonometric", "relu"), (5, 64))
    ),
    *(mixer_config("performer", kernel="plain_relu", chunk=chunk) for chunk in (5, 64)),
    *(
        mixer_config("logsparse", local=local, restart=restart, kernel=kernel)
        for local, restart, kernel in ((4, None, 1), (3, 16, 5), (1, 7, 2))
    ),
    *(mixer_config("topk", top_k=top_k, fraction=fraction) for top_k, fraction in ((5, None), (5, 3))),
    *(
        mixer_config("synthesizer", components=components, trainable=trainable, factor=7)
        for components, trainable in (
            (("dense",), True),
            (("factorised_dense",), True),
            (("factorised_random",), False),
            (("random", "dot_product"), True),
            (("random", "dense", "factorised_dense", "factorised_random", "dot_product"), False),
        )
    ),
    *(mixer_config("linformer", rank=6, sharing=sharing) for sharing in ("none", "key_value")),
    mixer_config("linformer", rank=(6, 2), sharing="none"),
    *(mixer_config("linformer", rank=6, compression=compression) for compression in ("mean", "max", "convolution")),
    *(mixer_config("linformer", rank=6, compression=kind, trainable=False) for kind in ("linear", "convolution")),
    mixer_config("linformer", rank=(6, 2), sharing="none", trainable=False),
    *(mixer_config("nystromformer", landmarks=4, kernel=kernel, iterations=2) for kernel in (0, 5)),
    *(mixer_config("combiner", plan=plan, block=4) for plan in ("fixed", "vertical", "horizontal", "mixture")),
    *(
        mixer_config("combiner", plan="rowmajor", block=4, row_summary=row_summary)
        for row_summary in ("none", "wsum", "proj", "wsum_proj")
    ),
    *(
        mixer_config("transformer_xl", segment_length=segment, same_length=same, memory_length=7, **options)
        for segment, same in product((None, 1, 8), (True, False))
        for options in ({}, {"zero_memory": True}, {"clamp_length": 5})
    ),
    mixer_config("transformer_xl", segment_length=8, memory_length=0, eval_memory_length=30, eval_same_length=True),
    *(
        mixer_config(
            "compressive",
            compression=compression,
            loss=loss,
            cm_positions=positions,
            dilations=(1, 2),
            rate=2,
            memory_length=6,
            compressed_length=5,
            segment_length=8,
            **options,
        )
        for compression, loss in (
            *(("convolution", loss) for loss in ("attention", "autoencoding", "bptt")),
            *((kind, None) for kind in ("dilated", "mean", "max", "most_used")),
        )
        for positions in ("official", "true")
        for options in ({}, {"zero_memory": True}, {"remainder": "carry"})
    ),
    mixer_config("compressive", segment_length=8, memory_length=9, compressed_length=0, rate=3, overlap=2),
    mixer_config("compressive", segment_length=3, memory_length=0, eval_memory_length=30, eval_compressed_length=7),
    mixer_config("combiner", plan="logsparse", activation="deepset", log_size_bias=True),
    mixer_config("combiner", plan="mixture", mixture="joint", block=4, pooling="mean"),
    *(
        mixer_config("retention", rotation=rotation, value_expansion=expansion, norm=norm, gate=gate, chunk=8)
        for rotation, expansion, norm, gate in ((False, 1, "rms", True), (True, 3, "group", False))
    ),
    *(
        mixer_config("gated_linear", key_expansion=keys, value_expansion=values, rank=3, norm=norm, gate=gate)
        for keys, values, norm, gate in ((1.0, 0.5, "layer", False), (0.25, 2.0, "rms", True))
    ),
    *(mixer_config("gated_linear", value_expansion=2.0, kernel=kernel) for kernel in (1, 4)),
    *(
        mixer_config("delta", gated=gated, kernel=kernel, negative_eigenvalues=turned, value_expansion=values)
        for gated, kernel, turned, values in ((True, 4, False, 2.0), (True, 0, True, 1.0), (False, 1, True, 0.5))
    ),
    *(
        mixer_config("gmlp", weights=weights, attention_dim=attention_dim, hidden_dim=hidden_dim)
        for weights, attention_dim, hidden_dim in (("full", 5, 14), ("toeplitz", 0, None), ("toeplitz", 8, 20))
    ),
    mixer_config("mlp_mixer", token_hidden_dim=5, hidden_dim=7),
    *(
        mixer_config("sparse_mlp", represent=represent, token_experts=3, experts=4, token_top_k=top_k, **options)
        for represent in ("tokens", "block", "none")
        for top_k, options in (
            (1, {}),
            (2, {"noise": False, "hidden_dim": 7, "represented_length": 11}),
            (3, {"balance_weight": 0.0, "token_hidden_dim": 5, "represented_dim": 9, "top_k": 1}),
            (1, {"group": "sequence", "capacity_factor": 50.0}),
        )
    ),
    *(
        mixer_config("r_transformer", cell=cell, window=window, local_layers=layers, hidden_dim=7)
        for cell, window, layers in (("rnn", 1, 2), ("lstm", 4, 2), ("gru", 40, 1), ("gru", 7, 0))
    ),
]
