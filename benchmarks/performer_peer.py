"""The causal Performer layer against that of performer-pytorch: forward and backward, float32, batch 1.

    pip install --no-deps performer-pytorch einops local-attention axial-positional-embedding hyper-connections
    python benchmarks/performer_peer.py

Whole layers with their projections, width 512, 8 heads, 256 features, at 4,096 tokens; the same weights and directions
on both sides. All layers take turns in one process; medians with quartiles, and 95 % intervals of the ratios. Before
any time is taken, results are compared at small inputs: the peer adds 1e-4 to every feature and shifts its keys by the
maximum of the whole sequence, so that they agree in about two digits.

Timed twice, as `peers.py` does and says why: as the C library leaves freed memory, and while it is kept.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peers import HEADS, WIDTH, Layer, draw_inputs, layer, step
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
from torch import nn

import subquad
from subquad.benchmark.memory import saved_bytes
from subquad.cli.console import plain_table, waiting
from subquad.mechanisms.performer import Performer
from subquad.records.units import size, times

PACKAGE = "performer_pytorch"
FEATURES, MOST_DIFFERENCE, TARGET = 256, 0.05, 20
PEER = "performer-pytorch, causal, without CUDA"
SETTINGS = f"""\
float32, training mode, no dropout, no padding, causal; biases of q, k and v are 0, since the peer has none
performer: {FEATURES} orthogonal features, drawn once
{PEER}: SelfAttention(dim={WIDTH}, causal=True, heads={HEADS}, nb_features={FEATURES}), redrawing off\
"""


@dataclass(frozen=True)
class Row:
    """One layer; the speed-up is that of ours over it, and so is the ratio of what is kept."""

    layer: str
    freed_memory: str
    seconds: Spread
    saved_bytes: int
    speed_up: SpeedUp | None
    lighter: float | None


def performer_layers() -> tuple[Performer, nn.Module]:
    """Ours and the peer's, with the same weights."""
    torch.manual_seed(0)
    ours = subquad.build_mixer("performer", embed_dim=WIDTH, num_heads=HEADS, causal=True, features=FEATURES)
    assert isinstance(ours, Performer)
    return ours, peer_of(ours)


def peer_of(ours: Performer) -> nn.Module:
    """The peer's layer with the weights and directions of ours."""
    package: Any = importlib.import_module(PACKAGE)
    dims = ours.dims
    theirs = package.SelfAttention(
        dim=dims.embed_dim,
        causal=True,
        heads=dims.num_heads,
        dim_head=dims.head_dim,
        nb_features=ours.config.features,
        feature_redraw_interval=None,
    )
    with torch.no_grad():
        for mine, its in (("query", theirs.to_q), ("key", theirs.to_k), ("value", theirs.to_v), ("out", theirs.to_out)):
            its.weight.copy_(getattr(ours, f"project_{mine}").weight)
        theirs.to_out.bias.copy_(ours.project_out.bias)
        theirs.fast_attention.projection_matrix.copy_(ours.directions)
    return theirs


def difference(ours: Layer, theirs: Layer, length: int) -> float:
    """Distance of the results at small inputs, relative to the result."""
    x = 0.3 * draw_inputs(length)[0].detach()
    with torch.no_grad():
        expected = theirs(x)
        return float((ours(x) - expected).norm() / expected.norm())


def measure(modules: dict[str, nn.Module], options: argparse.Namespace, *, keep_freed_memory: bool) -> list[Row]:
    """All layers in turns."""
    freed = "kept" if keep_freed_memory else "given back"
    x, upstream = draw_inputs(options.length)
    taken = sample_by_turns(
        {name: lambda module=module: step(module, x, upstream) for name, module in modules.items()},
        samples=options.samples,
        warm_up=options.warm_up,
        title=f"{options.length:,} tokens, freed memory {freed}",
        keep_freed_memory=keep_freed_memory,
    )
    kept = {name: saved_bytes(lambda m=module: layer(m)(x), module.parameters()) for name, module in modules.items()}
    return [
        Row(
            layer=name,
            freed_memory=freed,
            seconds=Spread.of(taken[name]),
            saved_bytes=kept[name],
            speed_up=None if name == "performer" else SpeedUp.of(taken[name], taken["performer"]),
            lighter=None if name == "performer" else kept[name] / kept["performer"],
        )
        for name in modules
    ]


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """The table."""
    table = plain_table()
    for heading in ("layer", "freed memory", "ms", "kept", "ours is faster", "ours is lighter", "target of both"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("layer", "freed memory") else "right")
    for row in rows:
        judged = row.layer == PEER and row.speed_up is not None
        table.add_row(
            row.layer,
            row.freed_memory,
            row.seconds.milliseconds(),
            size(row.saved_bytes),
            "–" if row.speed_up is None else str(row.speed_up),
            "–" if row.lighter is None else times(row.lighter),
            against_target(row.speed_up, TARGET) if judged and row.speed_up is not None else "–",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, then time; without the package, say so."""
    parser = sampling_options(__doc__)
    parser.add_argument("--length", type=int, default=4096)
    options, console = parser.parse_args(arguments), result_console()
    if importlib.util.find_spec(PACKAGE) is None:
        console.print("performer-pytorch is not installed, so nothing was timed; the top of this file says how to.")
        return
    prepare_torch(options.threads)
    describe_machine(console)
    console.print(f"{SETTINGS}\n", markup=False)
    with waiting("comparing results"):
        ours, theirs = performer_layers()
        apart = difference(layer(ours), layer(theirs), min(options.length, 512))
    if not apart <= MOST_DIFFERENCE:
        raise SystemExit(f"the results are {apart:.0%} apart; nothing was timed")
    full = subquad.build_mixer("full", embed_dim=WIDTH, num_heads=HEADS, causal=True)
    modules = {"full": full, "performer": ours, PEER: theirs}
    rows = [row for keep in (False, True) for row in measure(modules, options, keep_freed_memory=keep)]
    print_rows(console, rows)
    write_figures(options.json, {"length": options.length, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
