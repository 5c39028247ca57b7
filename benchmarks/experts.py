"""Speed of feed-forwards with experts: against the dense one of the same width, and Hugging Face's Switch.

    python benchmarks/experts.py

One sequence, float32, forward and backward, auxiliary loss included; medians by turns. GFLOP/s count the products of
the experts alone, so that a mixture of two has to do twice the work of the dense one at the same rate. Routing is a
step of the layer whose experts give back what they get: router, losses, sorting, gathering and putting back. Kept is
what autograd holds after the forward pass. Hugging Face's layer runs without jitter, which would change its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from unittest.mock import patch

import torch
from rich.console import Console
from rich.text import Text
from sampling import (
    Spread,
    describe_machine,
    prepare_torch,
    result_console,
    sample_by_turns,
    sampling_options,
    write_figures,
)
from torch import Tensor, nn
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from subquad.benchmark.memory import saved_bytes
from subquad.build import build_feedforward
from subquad.cli.console import BAD, GOOD, plain_table
from subquad.interface import Mixed
from subquad.layers import stacked_experts
from subquad.layers.expert_mixer import ExpertMixer
from subquad.ops.experts.grouped import Activation, ExpertWeights
from subquad.ops.experts.routing import ExpertRows
from subquad.records import units

LEAST_RATE, MOST_ROUTING = 0.85, 0.12
BASELINE = "mlp"


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    tokens: int
    width: int
    hidden: int
    experts: int


@dataclass(frozen=True)
class Row:
    """What was measured of one layer; times in seconds."""

    name: str
    seconds: Spread
    flops_per_second: float
    of_dense: float
    routing: float | None
    kept_bytes: int


def permute(
    x: Tensor, gates: Tensor, weights: ExpertWeights, rows: ExpertRows, activation: Activation, dropout: float = 0.0
) -> Tensor:
    """Experts that give back what they get."""
    weighted = x.index_select(0, rows.tokens) * gates[rows.tokens, rows.choices][:, None]
    return torch.zeros_like(x).index_add_(0, rows.tokens, weighted)


def build_layers(sizes: Sizes) -> dict[str, nn.Module]:
    """Every layer that is measured, in training mode."""
    common = {"embed_dim": sizes.width, "hidden_dim": sizes.hidden}
    with_experts = {**common, "experts": sizes.experts}
    theirs = SwitchTransformersConfig(
        d_model=sizes.width,
        d_ff=sizes.hidden,
        num_experts=sizes.experts,
        expert_capacity=sizes.tokens,
        dense_act_fn="gelu",
        dropout_rate=0.0,
        router_jitter_noise=0.0,
    )
    layers: dict[str, nn.Module] = {
        BASELINE: build_feedforward("mlp", **common),
        "glu": build_feedforward("glu", embed_dim=sizes.width, hidden_dim=2 * sizes.hidden // 3),
        "switch, dropless": build_feedforward("switch", **with_experts, capacity_factor=None),
        "switch, capacity 1.25": build_feedforward("switch", **with_experts),
        "moe, 2 of them": build_feedforward("moe", **with_experts),
        "Hugging Face's Switch": SwitchTransformersSparseMLP(theirs),
    }
    for parameter in layers["Hugging Face's Switch"].parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return {name: layer.train() for name, layer in layers.items()}


def step(layer: nn.Module, x: Tensor, upstream: Tensor) -> None:
    """Forward and backward, the auxiliary loss with the result."""
    layer.zero_grad()
    x.grad = None
    mixed = layer(x)
    y, aux_loss = (mixed.y, mixed.aux_loss) if isinstance(mixed, Mixed) else (mixed, None)
    results, gradients = (
        ([y], [upstream]) if aux_loss is None else ([y, aux_loss], [upstream, torch.ones_like(aux_loss)])
    )
    torch.autograd.backward(results, gradients)


def routing_step(layer: ExpertMixer, x: Tensor, upstream: Tensor) -> None:
    """A step without the products of the experts."""
    with patch.object(stacked_experts, "experts", permute):
        step(layer, x, upstream)


def measure(sizes: Sizes, *, samples: int | None, warm_up: int) -> list[Row]:
    """All layers by turns."""
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(1, sizes.tokens, sizes.width, generator=generator) for _ in range(2))
    x.requires_grad_()
    layers = build_layers(sizes)
    steps = {name: partial(step, layer, x, upstream) for name, layer in layers.items()}
    routed = {name: layer for name, layer in layers.items() if isinstance(layer, ExpertMixer)}
    steps |= {f"routing of {name}": partial(routing_step, layer, x, upstream) for name, layer in routed.items()}
    taken = sample_by_turns(steps, samples=samples, warm_up=warm_up, title=f"{sizes.tokens:,} tokens")
    flops = 3 * 4 * sizes.tokens * sizes.width * sizes.hidden
    dense = flops / Spread.of(taken[BASELINE]).median
    rows: list[Row] = []
    for name, layer in layers.items():
        own = Spread.of(taken[name])
        choices = layer.config.choices if isinstance(layer, ExpertMixer) else 1
        routing = Spread.of(taken[f"routing of {name}"]).median / own.median if name in routed else None
        kept = saved_bytes(partial(layer, x), layer.parameters())
        rate = choices * flops / own.median
        rows.append(Row(name, own, rate, rate / dense, routing, kept))
    return rows


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """The table; green where a target is reached and red where not."""
    table = plain_table()
    for heading in ("layer", "ms", "GFLOP/s", "of dense", "routing", "kept"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "layer" else "right")
    for row in rows:
        ours = row.routing is not None
        table.add_row(
            row.name,
            row.seconds.milliseconds(),
            f"{row.flops_per_second / 1e9:.0f}",
            _judged(row.of_dense, row.of_dense >= LEAST_RATE, judged=ours),
            Text("–") if row.routing is None else _judged(row.routing, row.routing <= MOST_ROUTING, judged=True),
            units.size(row.kept_bytes),
        )
    console.print(table)
    console.print(f"\nwanted: at least {LEAST_RATE:.0%} of the dense rate, at most {MOST_ROUTING:.0%} for routing")


def _judged(share: float, good: bool, *, judged: bool) -> Text:
    return Text(units.percent(share, 0), (GOOD if good else BAD) if judged else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = sampling_options(__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=8)
    options, console = parser.parse_args(arguments), result_console()
    prepare_torch(options.threads)
    torch.manual_seed(0)
    describe_machine(console)
    sizes = Sizes(options.tokens, options.width, options.hidden, options.experts)
    rows = measure(sizes, samples=options.samples, warm_up=options.warm_up)
    print_rows(console, rows)
    write_figures(options.json, {"sizes": asdict(sizes), "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
