"""Linformer: keys and values compressed along the length by learned matrices, or by blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import (
    assert_cross_equals_definition,
    assert_same_values_and_gradients,
    disturbed,
    finish,
    is_valid,
    masks,
    qkv,
    softmax_over,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad import Mask
from subquad.build import build_mixer
from subquad.mechanisms.linformer import Linformer
from subquad.models import SubquadConfig, SubquadModel

SHARINGS = ("none", "headwise", "key_value", "layerwise")
BLOCKS = [{"compression": "mean"}, {"compression": "max"}, {"compression": "convolution"}]
BLOCKS += [{"compression": "convolution", "sharing": sharing} for sharing in ("none", "key_value")]


def linformer(**options: Any) -> Linformer:
    options = {"embed_dim": 4, "num_heads": 2, "max_length": 12, "rank": 3, "sharing": "none", **options}
    mixer = build_mixer("linformer", **options)
    assert isinstance(mixer, Linformer)
    disturbed(mixer)
    return mixer


def blocks(**options: Any) -> Linformer:
    """Blocks of 3 tokens, the last one of 2."""
    return linformer(**{"rank": 4, "max_length": 11, "sharing": "headwise", **options})


def compressions(mixer: Linformer) -> tuple[Tensor, Tensor]:
    """What compresses keys and values."""
    assert mixer.compress_key is not None
    return mixer.compress_key, mixer.compress_key if mixer.compress_value is None else mixer.compress_value


def by_matrix(x: Tensor, matrix: Tensor) -> Tensor:
    """Tokens x (N, H, E), the n-th with the n-th column: (R, H, E)."""
    return torch.einsum("hrn,nhe->rhe", matrix.expand(x.shape[1], -1, -1)[..., : x.shape[0]], x)


def by_head(mixer: Linformer, ranks: tuple[int, ...], x: Tensor, mask: Mask | None) -> Tensor:
    """Head by head, each to as many rows as it has, its matrix behind those of the heads before it."""
    q, k, v = qkv(mixer, x, x)
    out = torch.zeros_like(q)
    for b in range(x.shape[0]):
        tokens = [j for j in range(x.shape[1]) if is_valid(mask, b, j)]
        for head, rank in enumerate(ranks):
            first = sum(ranks[:head])
            rows = [
                matrix[0, first : first + rank, : len(tokens)] @ y[b, tokens, head]
                for matrix, y in zip(compressions(mixer), (k, v), strict=True)
            ]
            out[b, :, head] = (q[b, :, head] @ rows[0].T / q.shape[-1] ** 0.5).softmax(dim=-1) @ rows[1]
    return finish(mixer, out, mask)


def by_blocks(x: Tensor, compression: str, weights: Tensor | None) -> Tensor:
    """Blocks of three tokens, a convolution's last one filled up with zeros."""
    rows = []
    for block in x.split(3):
        if compression == "mean":
            rows.append(block.mean(dim=0))
        elif compression == "max":
            rows.append(block.max(dim=0).values)
        else:
            assert weights is not None
            rows.append(torch.einsum("nhe,hne->he", block, weights.expand(x.shape[1], -1, -1)[:, : block.shape[0]]))
    return torch.stack(rows)


def definition(mixer: Linformer, x: Tensor, source: Tensor, mask: Mask | None, source_mask: Mask | None) -> Tensor:
    """Valid tokens of the source alone are compressed, the others leave no gap."""
    q, k, v = qkv(mixer, x, source)
    compression, out = mixer.config.compression, []
    of_keys, of_values = (None, None) if mixer.compress_key is None else compressions(mixer)
    for b in range(x.shape[0]):
        tokens = [j for j in range(source.shape[1]) if is_valid(source_mask, b, j)]
        if not tokens:
            out.append(torch.zeros_like(q[b]))
            continue
        if compression == "linear":
            assert of_keys is not None
            assert of_values is not None
            keys, values = by_matrix(k[b, tokens], of_keys), by_matrix(v[b, tokens], of_values)
        else:
            keys, values = (
                by_blocks(k[b, tokens], compression, of_keys),
                by_blocks(v[b, tokens], compression, of_values),
            )
        out.append(torch.stack([softmax_over(q[b, i], keys, values) for i in range(x.shape[1])]))
    return finish(mixer, torch.stack(out), mask)


@pytest.mark.parametrize("sharing", SHARINGS)
@given(length=st.sampled_from([1, 2, 3, 4, 12]), data=st.data())
def test_it_equals_the_definition(sharing: str, length: int, data: st.DataObject) -> None:
    mixer, mask = linformer(sharing=sharing), data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(
        mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, x, mask, mask), [x]
    )


@pytest.mark.parametrize("ranks", [(3, 1), (2, 2), (1, 5)], ids=str)
@given(length=st.sampled_from([1, 4, 12]), data=st.data())
def test_heads_of_different_ranks_equal_the_definition(
    ranks: tuple[int, ...], length: int, data: st.DataObject
) -> None:
    trainable, mask = data.draw(st.booleans()), data.draw(masks(2, length, segments=False))
    mixer = linformer(rank=ranks, trainable=trainable)
    assert [tuple(matrix.shape) for matrix in compressions(mixer)] == [(1, sum(ranks), 12)] * 2
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: by_head(mixer, ranks, x, mask), [x])


@pytest.mark.parametrize("options", BLOCKS, ids=str)
@given(length=st.sampled_from([1, 2, 3, 4, 11]), data=st.data())
def test_blocks_equal_the_definition(options: dict[str, Any], length: int, data: st.DataObject) -> None:
    mixer, mask = blocks(**options), data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(
        mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, x, mask, mask), [x]
    )


@pytest.mark.parametrize("compression", ["mean", "max", "convolution"])
@given(length=st.sampled_from([1, 5]), source_length=st.sampled_from([1, 5, 11]), data=st.data())
def test_cross_attention_to_blocks_equals_the_definition(
    compression: str, length: int, source_length: int, data: st.DataObject
) -> None:
    mixer = blocks(compression=compression, cross=True)
    assert_cross_equals_definition(mixer, definition, length, source_length, data)


@given(length=st.sampled_from([1, 5, 12]), source_length=st.sampled_from([1, 5, 12]), data=st.data())
def test_cross_attention_equals_the_definition(length: int, source_length: int, data: st.DataObject) -> None:
    mixer = linformer(cross=True)
    assert_cross_equals_definition(mixer, definition, length, source_length, data)


@pytest.mark.parametrize("permuted", [False, True])
def test_with_full_rank_and_the_identity_it_is_softmax_attention(permuted: bool) -> None:
    mixer, x = linformer(sharing="headwise", rank=9, max_length=9), torch.randn(2, 9, 4, dtype=torch.float64)
    matrix = torch.eye(9, dtype=torch.float64)[torch.randperm(9) if permuted else torch.arange(9)]
    with torch.no_grad():
        for compression in compressions(mixer):
            compression.copy_(matrix[None])
    dense = build_mixer("full", embed_dim=4, num_heads=2).double()
    dense.load_state_dict({name: value for name, value in mixer.state_dict().items() if "compress" not in name})
    torch.testing.assert_close(mixer(x).y, dense(x).y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"compression": "mean"}, {"compression": "max"}], ids=str)
def test_with_blocks_of_one_token_it_is_softmax_attention(options: dict[str, Any]) -> None:
    mixer, x = linformer(sharing="headwise", rank=20, max_length=9, **options), torch.randn(2, 9, 4).double()
    dense = build_mixer("full", embed_dim=4, num_heads=2).double()
    dense.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x).y, dense(x).y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("compression", ["linear", "convolution"])
def test_with_averages_over_blocks_it_is_attention_to_mean_keys_and_values(compression: str) -> None:
    options = {"rank": 4, "max_length": 12, "sharing": "key_value"}
    mixer, means = linformer(compression=compression, **options), blocks(compression="mean", max_length=12)
    averages = (torch.eye(4, dtype=torch.float64) / 3).repeat_interleave(3, dim=1)
    with torch.no_grad():
        compressions(mixer)[0].copy_(averages[None] if compression == "linear" else averages[:1, :3, None])
    means.load_state_dict({name: value for name, value in mixer.state_dict().items() if "compress" not in name})
    x = torch.randn(2, 12, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(x).y, means(x).y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("sharing", "matrices", "heads"), [("none", 2, 2), ("headwise", 2, 1), ("key_value", 1, 1), ("layerwise", 1, 1)]
)
def test_sharing_sets_the_number_of_compressions(sharing: str, matrices: int, heads: int) -> None:
    mixer = linformer(sharing=sharing)
    found = [parameter for name, parameter in mixer.named_parameters() if "compress" in name]
    assert [tuple(parameter.shape) for parameter in found] == [(heads, 3, 12)] * matrices
    assert mixer.shared_parameters() == (("compress_key",) if sharing == "layerwise" else ())


def test_a_shared_compression_gathers_the_gradients_of_keys_and_values() -> None:
    shared, apart = linformer(sharing="key_value"), linformer(sharing="headwise")
    apart.load_state_dict(shared.state_dict() | {"compress_value": shared.compress_key})
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    for mixer in (shared, apart):
        mixer(x).y.square().sum().backward()
    of_keys, of_values, of_both = compressions(apart)[0].grad, compressions(apart)[1].grad, compressions(shared)[0].grad
    assert of_keys is not None
    assert of_values is not None
    torch.testing.assert_close(of_both, of_keys + of_values, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("compression", ["linear", "mean", "max", "convolution"])
def test_padding_leaves_the_result_wherever_it_stands(compression: str) -> None:
    mixer, x = linformer(compression=compression, sharing="headwise"), torch.randn(1, 6, 4, dtype=torch.float64)
    valid = torch.tensor([[False, True, True, False, True, True, True, False, False, True]])
    spread = torch.randn(1, 10, 4, dtype=torch.float64)
    spread[valid] = x[0]
    torch.testing.assert_close(mixer(spread, mask=Mask(valid)).y[valid], mixer(x).y[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("trainable", [True, False])
def test_compressed_rows_keep_the_scale_of_a_key(trainable: bool) -> None:
    mixer = build_mixer("linformer", embed_dim=4, num_heads=2, max_length=4096, rank=64, trainable=trainable)
    assert isinstance(mixer, Linformer)
    compressed = compressions(mixer)[0].detach() @ torch.randn(4096, 8)
    assert 0.9 < float(compressed.std()) < 1.1


class TestWhatIsNotLearned:
    """With trainable=False compressions are random, drawn by (seed, layer), saved, and never change."""

    @pytest.mark.parametrize("sharing", SHARINGS)
    @given(length=st.sampled_from([1, 5, 12]), data=st.data())
    def test_it_equals_the_definition(self, sharing: str, length: int, data: st.DataObject) -> None:
        mixer, mask = linformer(trainable=False, sharing=sharing), data.draw(masks(2, length, segments=False))
        x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
        assert_same_values_and_gradients(
            mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, x, mask, mask), [x]
        )

    def test_convolutions_equal_the_definition(self) -> None:
        mixer = blocks(compression="convolution", trainable=False)
        x = torch.randn(2, 11, 4, dtype=torch.float64, requires_grad=True)
        assert_same_values_and_gradients(mixer, lambda: mixer(x).y, lambda: definition(mixer, x, x, None, None), [x])

    def test_it_is_saved_and_no_parameter(self) -> None:
        mixer = linformer(trainable=False)
        names = {"compress_key", "compress_value"}
        assert mixer.state_dict().keys() >= names
        assert not names & {name for name, _ in mixer.named_parameters()}

    def test_initialising_keeps_it(self) -> None:
        mixer = linformer(trainable=False)
        before = compressions(mixer)[0].clone()
        mixer.initialise()
        assert torch.equal(compressions(mixer)[0], before)

    def test_it_is_drawn_by_seed_and_layer(self) -> None:
        first, *others = (
            compressions(linformer(trainable=False, seed=seed, layer=layer)) for seed, layer in ((0, 0), (1, 0), (0, 1))
        )
        assert torch.equal(first[0], compressions(linformer(trainable=False))[0])
        assert not torch.equal(first[0], first[1])
        assert not any(torch.equal(first[0], other[0]) for other in others)

    def test_shared_over_layers_it_is_drawn_the_same_in_all(self) -> None:
        one, other = (linformer(trainable=False, sharing="layerwise", layer=layer) for layer in (0, 1))
        assert torch.equal(compressions(one)[0], compressions(other)[0])
        assert one.shared_parameters() == ()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"compression": "mean", "sharing": "headwise"}, "compression='mean' learns nothing that could be fixed"),
            ({"seed": -1}, "linformer: seed must be at least 0, got -1"),
        ],
    )
    def test_options_that_mean_nothing_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            linformer(**{"trainable": False, **options})


def test_the_rank_may_fall_over_depth() -> None:
    first, second = ({"name": "linformer", "sharing": "layerwise", "rank": rank} for rank in (6, 2))
    config = SubquadConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=11,
        mixer=[first, second],
    )
    shapes = [tuple(p.shape) for name, p in SubquadModel(config).named_parameters() if "compress" in name]
    assert shapes == [(1, 6, 12), (1, 2, 12)]  # layers of equal rank share one
    message = (
        r"linformer: its layers share compress_key, but in blocks\.0\.mixer the shape is \(1, 6, 12\), elsewhere "
        r"\(1, 2, 12\); give layers that share the same options, or share nothing over layers"
    )
    with pytest.raises(ValueError, match=message):  # no two layers have a rank in common
        SubquadModel(config.with_changes(num_hidden_layers=2))


def test_longer_input_and_context_are_refused() -> None:
    with pytest.raises(ValueError, match="x has length 13 but was built for max_length=12"):
        linformer()(torch.zeros(1, 13, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="context has length 13 but was built for max_length=12"):
        linformer(cross=True)(torch.zeros(1, 3, 4), torch.zeros(1, 13, 4))


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="linformer: rank must be at least 1, got 0"):
        linformer(rank=0)
    with pytest.raises(ValueError, match=r"linformer: rank must be at least 1, got \(3, 0\)"):
        linformer(rank=(3, 0))
    with pytest.raises(ValueError, match=r"rank=\(3, 2, 1\) must have one entry for each head, expected 2, got 3"):
        linformer(rank=(3, 2, 1))
    with pytest.raises(
        ValueError, match=r"a rank for each head, \(3, 2\), goes with compression='linear' and sharing='none'"
    ):
        linformer(rank=(3, 2), sharing="headwise")
    with pytest.raises(
        ValueError, match="option 'sharing' must be one of 'none', 'headwise', 'key_value', 'layerwise'"
    ):
        linformer(sharing="head")
    with pytest.raises(ValueError, match="compression='mean' learns nothing that could be shared; leave out sharing"):
        linformer(compression="mean", sharing="layerwise")
    with pytest.raises(ValueError, match="linformer: causal=True is not supported; mechanisms that support it: "):
        linformer(causal=True)
