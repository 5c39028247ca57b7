"""The patterns that the benchmarks of the pattern engine time, their inputs, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sampling import sample_by_turns
from torch import Tensor

from subquad.ops.pattern_attention import pattern_attention
from subquad.patterns import Block, BlockWindow, Causal, Columns, Dilated, Global, Ngram, Random, Strided, Window
from subquad.patterns.pattern import Pattern

BATCH, HEADS, WIDTH = 1, 8, 64
GATE_LENGTH, GATE_ERROR = 1024, 2e-5
FORWARD_FLOPS_PER_PAIR = 4 * WIDTH
STEP_PER_FORWARD = 3.5
"""Two products forward, five backward, since the scores are made again."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: as on the command line.
        pattern: for a length.
        keys: for a length, the most keys that any query sees; global rows, which see all, are left out.
        pays_from: it must not be slower than dense attention from this many times `keys` up.
        targets: length -> how many times faster than dense attention it is to be on two cores.
    """

    name: str
    pattern: Callable[[int], Pattern]
    keys: Callable[[int], int]
    pays_from: int
    targets: Mapping[int, float]

    def baseline(self, length: int) -> str:
        """What it is compared with: dense attention, causal if the pattern is."""
        return "causal dense" if self.pattern(length).causal else "dense"

    def shortest_that_pays(self) -> int:
        """The shortest length at which it must not be slower than dense attention."""
        return next(length for length in count(1) if length >= self.pays_from * self.keys(length))

    def attention(self, length: int) -> Attention:
        """The engine on this pattern."""
        pattern = self.pattern(length)
        return lambda q, k, v: pattern_attention(q, k, v, pattern)


def bigbird(length: int, block: int = 64, random: int = 3) -> Pattern:
    """First and last block global, one neighbour on each side, and random blocks of each head's own."""
    last = (length - 1) // block * block
    fixed = Global((*range(min(block, length)), *range(last, length))) | BlockWindow(block, 1, 1)
    return fixed.heads({head: fixed | Random(block, random, seed=head, exclude=fixed) for head in range(HEADS)})


_FIXED = Causal() & (Block(128) | Columns(128, 8))
_STRIDED = Causal() & (Window(127, 0) | Strided(128))

CASES = {
    case.name: case
    for case in (
        Case("window-513", lambda _: Window(256, 256), lambda _: 513, 2, {4096: 5.0, 16384: 19}),
        Case("window-129", lambda _: Window(64, 64), lambda _: 129, 2, {4096: 14, 16384: 46}),
        Case("causal-256", lambda _: Window(255, 0), lambda _: 256, 2, {4096: 5, 16384: 16}),
        Case("bigbird", bigbird, lambda _: 512, 4, {4096: 4.4, 16384: 15}),
        Case("fixed", lambda _: _FIXED, lambda length: 128 + 8 * ((length - 1) // 128), 4, {4096: 6.3, 16384: 11}),
        Case("strided", lambda _: _STRIDED, lambda length: 128 + (length - 1) // 128, 4, {4096: 5.2, 16384: 15}),
        Case("dilated", lambda _: Dilated(64, 64, 4), lambda _: 129, 2, {4096: 12, 16384: 37}),
        Case("ngram", lambda _: Ngram(8), lambda _: 7, 2, {4096: 16, 16384: 48}),
    )
}


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
    """Forward and backward: the result and the gradients of q, k and v."""
    q, k, v, upstream = inputs
    out = attention(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Fused attention of every pair."""
    return F.scaled_dot_product_attention(q, k, v)


def dense_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Fused attention of every pair j <= i."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


BASELINES: Mapping[str, Attention] = {"dense": dense, "causal dense": dense_causal}


def sample_beside_baselines(
    cases: Sequence[Case], length: int, *, samples: int | None, warm_up: int
) -> dict[str, list[float]]:
    """Seconds of a step of every case and of the baselines that they need, all in turns."""
    inputs = Inputs.draw(length)
    methods = {name: BASELINES[name] for name in dict.fromkeys(case.baseline(length) for case in cases)}
    methods |= {case.name: case.attention(length) for case in cases}
    steps = {name: lambda attention=attention: step(attention, inputs) for name, attention in methods.items()}
    return sample_by_turns(steps, samples=samples, warm_up=warm_up, title=f"{length:,} tokens")


def check_against_definition(case: Case) -> None:
    """Result and gradients against the definition in float64, before any time is taken.

    Raises:
        SystemExit: they differ by more than float32 explains.
    """
    pattern, inputs = case.pattern(GATE_LENGTH), Inputs.draw(GATE_LENGTH)
    expected = step(lambda q, k, v: pattern_attention(q, k, v, pattern, backend="dense"), inputs.double())
    for name, got, right in zip("oqkv", step(case.attention(GATE_LENGTH), inputs), expected, strict=True):
        error = float((got - right).abs().max() / right.abs().max())
        if not error <= GATE_ERROR:
            what = "the result" if name == "o" else f"the gradient of {name}"
            raise SystemExit(f"{case.name}: {what} is off by {error:.1e} of its largest entry; nothing was timed")


def visible_pairs(pattern: Pattern, length: int) -> int:
    """Visible pairs of all heads together."""
    pairs = int(pattern.keys_per_query(length).sum())
    return pairs if pattern.num_heads else HEADS * pairs
