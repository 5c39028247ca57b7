"""The patterns that the benchmarks of the pattern engine time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count

from attention_rows import BATCH, HEADS, WIDTH, Attention, Inputs, check_against

from subquad.ops.pattern.attention import pattern_attention
from subquad.patterns import Block, BlockWindow, Causal, Columns, Dilated, Global, Ngram, Random, Strided, Window
from subquad.patterns.pattern import Pattern

GATE_LENGTH, GATE_ERROR = 1024, 2e-5
FORWARD_FLOPS_PER_PAIR = 4 * WIDTH
STEP_PER_FORWARD = 3.5
"""Two products forward, five backward, since the scores are made again."""


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

    def useful_flops(self, length: int) -> float:
        """Of the visible pairs."""
        return STEP_PER_FORWARD * FORWARD_FLOPS_PER_PAIR * BATCH * visible_pairs(self.pattern(length), length)


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


def find(name: str) -> Case:
    """The row of a name."""
    return CASES[name]


def check_against_definition(case: Case) -> None:
    """The engine against the definition.

    Raises:
        SystemExit: they differ by more than float32 explains.
    """
    pattern = case.pattern(GATE_LENGTH)
    check_against(
        case.name,
        case.attention(GATE_LENGTH),
        lambda q, k, v: pattern_attention(q, k, v, pattern, backend="dense"),
        Inputs.draw(GATE_LENGTH),
        error=GATE_ERROR,
    )


def visible_pairs(pattern: Pattern, length: int) -> int:
    """Visible pairs of all heads together."""
    pairs = int(pattern.keys_per_query(length).sum())
    return pairs if pattern.num_heads else HEADS * pairs
