"""One table for all benchmarks of attention: methods by turns with the dense attention that they are held against.

Batch 1, 8 heads of width 64, float32, forward and backward. Figures are medians with quartiles, speed-ups have a 95 %
interval. Useful GFLOP/s count what a method has to compute; "of sgemm" compares them with the best product of two
2048 x 2048 matrices in the same run. "kept" is what autograd keeps, in units of q, k, v, the result and its
log-sum-exp. Targets are those of two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from rich.console import Console
from sampling import SpeedUp, Spread, against_target, sample_by_turns
from torch import Tensor

from subquad.benchmark.memory import saved_bytes
from subquad.benchmark.timing import interleaved_seconds
from subquad.cli.console import plain_table
from subquad.receipt import receipts
from subquad.records.units import percent

BATCH, HEADS, WIDTH = 1, 8, 64
FLOAT_BYTES = 4
LENGTHS = (4096, 16384)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Method(Protocol):
    """A row of the table."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    @property
    def targets(self) -> Mapping[int, float]:
        """Length -> how many times faster than dense attention it is to be on two cores."""
        ...

    def baseline(self, length: int) -> str:
        """What it is compared with, of `BASELINES`."""
        ...

    def attention(self, length: int) -> Attention:
        """What is timed."""
        ...

    def useful_flops(self, length: int) -> float:
        """What forward and backward have to compute, all heads together."""
        ...


class Inputs(NamedTuple):
    """q, k, v and the gradient of the result, all (B, H, L, E) and contiguous."""

    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor

    @classmethod
    def draw(cls, length: int) -> Inputs:
        """The same for every method; float32."""
        generator = torch.Generator().manual_seed(0)
        q, k, v, upstream = (torch.randn(BATCH, HEADS, length, WIDTH, generator=generator) for _ in range(4))
        return cls(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), upstream)

    def double(self) -> Inputs:
        """The same in float64."""
        q, k, v, upstream = (tensor.detach().double() for tensor in self)
        return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), upstream)


def step(attention: Attention, inputs: Inputs) -> tuple[Tensor, ...]:
    """Forward and backward: the result and the gradients of q, k and v; a method's parameters get theirs too."""
    *leaves, upstream = inputs
    for leaf in leaves:
        leaf.grad = None
    out = attention(*leaves)
    out.backward(upstream)
    return out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Fused attention of every pair."""
    return F.scaled_dot_product_attention(q, k, v)


def dense_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Fused attention of every pair j <= i."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


BASELINES: Mapping[str, Attention] = {"dense": dense, "causal dense": dense_causal}


def sample_beside_baselines(
    methods: Sequence[Method], length: int, *, samples: int | None, warm_up: int
) -> dict[str, list[float]]:
    """Seconds of a step of every method and of the baselines that they need, all in turns."""
    inputs = Inputs.draw(length)
    functions = {name: BASELINES[name] for name in dict.fromkeys(method.baseline(length) for method in methods)}
    functions |= {method.name: method.attention(length) for method in methods}
    steps = {name: lambda attention=attention: step(attention, inputs) for name, attention in functions.items()}
    return sample_by_turns(steps, samples=samples, warm_up=warm_up, title=f"{length:,} tokens")


def check_against(name: str, attention: Attention, definition: Attention, inputs: Inputs, *, error: float) -> None:
    """Result and gradients against a definition in float64, before any time is taken.

    Raises:
        SystemExit: they differ by more than `error` of the largest entry.
    """
    expected = step(definition, inputs.double())
    for which, got, right in zip("oqkv", step(attention, inputs), expected, strict=True):
        found = float((got - right).abs().max() / right.abs().max())
        if not found <= error:
            what = "the result" if which == "o" else f"the gradient of {which}"
            raise SystemExit(f"{name}: {what} is off by {found:.1e} of its largest entry; nothing was timed")


@dataclass(frozen=True)
class Row:
    """What was measured of one method at one length; times in seconds."""

    name: str
    length: int
    seconds: Spread
    against: str
    dense_seconds: Spread
    speed_up: SpeedUp
    target: float | None
    flops_per_second: float
    of_sgemm: float
    kept: float
    receipts: list[str]


def sgemm_flops_per_second() -> float:
    """The best rate of a float32 product of two 2048 x 2048 matrices."""
    a, b = torch.rand(2048, 2048), torch.rand(2048, 2048)
    return 2 * 2048**3 / min(interleaved_seconds({"product": lambda: a @ b}, rounds=15, warm_up=3)["product"])


def kept_ratio(method: Method, length: int) -> float:
    """Saved bytes of a forward pass, in units of q, k, v, the result and its log-sum-exp."""
    attention, (q, k, v, _) = method.attention(length), Inputs.draw(length)
    least = FLOAT_BYTES * BATCH * HEADS * length * (4 * WIDTH + 1)
    return saved_bytes(lambda: attention(q, k, v), ()) / least


def receipts_of(method: Method, length: int) -> list[str]:
    """What ran instead of what was asked for, in one step."""
    with receipts() as left:
        step(method.attention(length), Inputs.draw(length))
    return [f"{entry.ran} instead of {entry.asked}: {entry.reason}" for entry in left.entries]


def measure_length(methods: Sequence[Method], length: int, options: argparse.Namespace, sgemm: float) -> list[Row]:
    """All methods at one length, in turns with the baselines that they need."""
    taken = sample_beside_baselines(methods, length, samples=options.samples, warm_up=options.warm_up)
    rows: list[Row] = []
    for method in methods:
        own, against = Spread.of(taken[method.name]), method.baseline(length)
        rate = method.useful_flops(length) / own.median
        row = Row(
            name=method.name,
            length=length,
            seconds=own,
            against=against,
            dense_seconds=Spread.of(taken[against]),
            speed_up=SpeedUp.of(taken[against], taken[method.name]),
            target=method.targets.get(length),
            flops_per_second=rate,
            of_sgemm=rate / sgemm,
            kept=kept_ratio(method, length),
            receipts=receipts_of(method, length),
        )
        rows.append(row)
    return rows


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """The table, and the receipts below it."""
    table = plain_table()
    headings = ("method", "length", "ms", "against", "its ms", "speed-up", "target", "GFLOP/s", "of sgemm", "kept")
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("method", "against") else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.length:,}",
            row.seconds.milliseconds(),
            row.against,
            row.dense_seconds.milliseconds(),
            str(row.speed_up),
            against_target(row.speed_up, row.target),
            f"{row.flops_per_second / 1e9:.1f}",
            percent(row.of_sgemm, 0),
            f"{row.kept:.2f}",
        )
    console.print(table)
    for row in rows:
        for line in row.receipts:
            console.print(f"receipt of {row.name} at {row.length:,}: {line}")


def measure_table(console: Console, methods: Sequence[Method], options: argparse.Namespace) -> dict[str, object]:
    """All lengths; prints the table and returns its figures."""
    sgemm = sgemm_flops_per_second()
    lengths = options.lengths or LENGTHS
    rows = [row for length in lengths for row in measure_length(methods, length, options, sgemm)]
    print_rows(console, rows)
    console.print(f"\nsgemm: {sgemm / 1e9:.0f} GFLOP/s")
    return {"sgemm_flops_per_second": sgemm, "rows": [asdict(row) for row in rows]}
