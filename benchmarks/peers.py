"""Longformer and BigBird layers against those of Hugging Face transformers: forward and backward, float32, batch 1.

    python benchmarks/peers.py
    python benchmarks/peers.py --length 8192 --samples 5

Whole layers with their projections, width 512, 8 heads, at 4,096 tokens; the same weights on both sides. All methods
take turns in one process; medians with quartiles, and 95 % intervals of the ratios. Before any time is taken, results
are compared: Longformer everywhere, BigBird in its first and last block, whose tokens see everything (the other random
blocks are drawn differently), and BigBird with and without its matrix of probabilities.

All are timed twice: first as the C library leaves it, which gives large tensors back to the system and pays for their
pages again, then while freed memory is kept, as everywhere else here. Layers with large temporaries, the peers', gain.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from hugging_face import BigBirdWithoutProbabilities, HuggingFaceBigBird, HuggingFaceLongformer
from rich.console import Console
from sampling import (
    SpeedUp,
    Spread,
    against_target,
    describe_machine,
    prepare_torch,
    result_console,
    sample_by_turns,
    sampling_options,
    write_figures,
)
from torch import Tensor, nn
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

import subquad
from subquad.benchmark.memory import saved_bytes
from subquad.cli.console import plain_table, waiting
from subquad.layers.heads import HeadMixer
from subquad.records.units import size

WIDTH, HEADS = 512, 8
WINDOW, BLOCK, RANDOM = 513, 64, 3
MOST_ERROR = 1e-4
SETTINGS = f"""\
float32, training mode, no dropout, no padding, no global tokens, biases; output projection behind the peers' layers
longformer: window {WINDOW}; Hugging Face: attention_window {WINDOW - 1}, which doesn't count the token itself
bigbird: block {BLOCK}, {RANDOM} random blocks; Hugging Face: the same, masks made beforehand; "without probabilities" \
leaves out
the (heads x length x length) matrix that the layer fills for a second result, though nobody asks for it\
"""

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One layer; the speed-up is that of ours over it."""

    layer: str
    freed_memory: str
    seconds: Spread
    saved_bytes: int
    ours: str | None
    speed_up: SpeedUp | None
    target: float | None


@dataclass(frozen=True)
class Contest:
    """A layer of ours and its peers, with how many times faster than each it is to be on two cores."""

    ours: str
    modules: dict[str, nn.Module]
    targets: dict[str, float]


def longformer_contest(length: int) -> Contest:
    """The same function: compared everywhere.

    Raises:
        SystemExit: a length that the peer can't do, or results that differ.
    """
    if length % (WINDOW - 1):
        raise SystemExit(f"--length must be a multiple of {WINDOW - 1} for Hugging Face's Longformer, got {length}")
    ours = _mixer("longformer", window=WINDOW)
    theirs = HuggingFaceLongformer(ours, attention_window=WINDOW - 1)
    _compare("longformer", layer(ours), layer(theirs), length, rows=slice(None))
    return Contest(
        "longformer", {"longformer": ours, "Hugging Face Longformer": theirs}, {"Hugging Face Longformer": 4}
    )


def bigbird_contest(length: int) -> Contest:
    """The same but for the draw of random blocks: compared in the global blocks.

    Raises:
        SystemExit: results that differ.
    """
    ours = _mixer("bigbird", block=BLOCK)
    shipped, without = (
        HuggingFaceBigBird(ours, block=BLOCK, random=RANDOM, length=length, attention=attention)
        for attention in (BigBirdBlockSparseAttention, BigBirdWithoutProbabilities)
    )
    _compare("Hugging Face BigBird", layer(shipped), layer(without), length, rows=slice(None))
    for rows in (slice(0, BLOCK), slice(length - BLOCK, length)):
        _compare("bigbird", layer(ours), layer(shipped), length, rows=rows)
    names = ("Hugging Face BigBird, as shipped", "Hugging Face BigBird, without probabilities")
    modules = {"bigbird": ours, **dict(zip(names, (shipped, without), strict=True))}
    return Contest("bigbird", modules, dict.fromkeys(names, 2.0))


def _mixer(name: str, **options: Any) -> HeadMixer:
    torch.manual_seed(0)
    mixer = subquad.build_mixer(name, embed_dim=WIDTH, num_heads=HEADS, **options)
    assert isinstance(mixer, HeadMixer)
    return mixer


def layer(module: nn.Module) -> Layer:
    """A module as a function of x alone, whatever else it returns."""
    if isinstance(module, HeadMixer):
        return lambda x: module(x).y
    return module


def _compare(what: str, ours: Layer, theirs: Layer, length: int, *, rows: slice) -> None:
    x, upstream = draw_inputs(length)
    outside = torch.ones(length, dtype=torch.bool)
    outside[rows] = False
    upstream = upstream.masked_fill(outside[:, None], 0.0)
    results = [(function(x)[:, rows].detach(), _gradient(function, x, upstream)) for function in (ours, theirs)]
    for name, got, expected in zip(("results", "gradients of x"), *results, strict=True):
        error = float((got - expected).abs().max() / expected.abs().max())
        if not error <= MOST_ERROR:
            raise SystemExit(f"{what}: {name} differ by {error:.1e} of the largest entry; nothing was timed")


def _gradient(function: Layer, x: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad(function(x), x, upstream)[0]


def draw_inputs(length: int) -> tuple[Tensor, Tensor]:
    """X, whose gradient is wanted too, and the gradient of the result; both (1, L, D)."""
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(1, length, WIDTH, generator=generator) for _ in range(2))
    return x.requires_grad_(), upstream


def step(module: nn.Module, x: Tensor, upstream: Tensor) -> None:
    """Forward, and backward to x and to all parameters that took part."""
    torch.autograd.grad(layer(module)(x), (x, *module.parameters()), upstream, allow_unused=True)


def measure(contests: Sequence[Contest], options: argparse.Namespace, *, keep_freed_memory: bool) -> list[Row]:
    """All layers and fused dense attention in turns."""
    freed = "kept" if keep_freed_memory else "given back"
    x, upstream = draw_inputs(options.length)
    modules: dict[str, nn.Module] = {"full": _mixer("full")}
    for contest in contests:
        modules |= contest.modules
    taken = sample_by_turns(
        {name: lambda module=module: step(module, x, upstream) for name, module in modules.items()},
        samples=options.samples,
        warm_up=options.warm_up,
        title=f"{options.length:,} tokens, freed memory {freed}",
        keep_freed_memory=keep_freed_memory,
    )
    kept = {name: saved_bytes(lambda m=module: layer(m)(x), module.parameters()) for name, module in modules.items()}
    rows = [Row("full", freed, Spread.of(taken["full"]), kept["full"], None, None, None)]
    for contest in contests:
        rows += [
            Row(
                layer=name,
                freed_memory=freed,
                seconds=Spread.of(taken[name]),
                saved_bytes=kept[name],
                ours=contest.ours,
                speed_up=None if name == contest.ours else SpeedUp.of(taken[name], taken[contest.ours]),
                target=contest.targets.get(name),
            )
            for name in contest.modules
        ]
    return rows


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """The table."""
    table = plain_table()
    for heading in ("layer", "freed memory", "ms", "kept by autograd", "ours is faster", "target"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("layer", "freed memory") else "right")
    for row in rows:
        table.add_row(
            row.layer,
            row.freed_memory,
            row.seconds.milliseconds(),
            size(row.saved_bytes),
            "–" if row.speed_up is None else str(row.speed_up),
            "–" if row.speed_up is None else against_target(row.speed_up, row.target),
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, then time."""
    parser = sampling_options(__doc__)
    parser.add_argument("--length", type=int, default=4096)
    options, console = parser.parse_args(arguments), result_console()
    prepare_torch(options.threads)
    describe_machine(console)
    console.print(f"{SETTINGS}\n", markup=False)
    with waiting("comparing results"):
        contests = [longformer_contest(options.length)]
        if "bigbird" in subquad.list_mixers():
            contests.append(bigbird_contest(options.length))
    rows = [row for keep in (False, True) for row in measure(contests, options, keep_freed_memory=keep)]
    print_rows(console, rows)
    if len(contests) == 1:
        console.print("\nbigbird is not among the registered mixers, so its peers were not timed.")
    write_figures(options.json, {"length": options.length, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
