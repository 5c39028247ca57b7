"""Plans: how the past of every token, or everything, is split into tokens attended directly and disjoint regions.

A plan states the partition of each token, which is its definition, and lays all of them out as parts of rectangles.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from subquad.ops.combiner.blocks import Blocks, Shared
from subquad.ops.combiner.layout import Layout, sizes_by, tokens
from subquad.ops.combiner.region_pooling import Reduction
from subquad.ops.combiner.region_summary import PooledSummary, RegionSummary
from subquad.ops.combiner.stream_regions import Segments, StreamPlan
from subquad.ops.combiner.summarize import Summarize
from subquad.ops.rectangles import Part, View


class Region(NamedTuple):
    """Tokens that a query attends through their summary.

    Attributes:
        tokens: their positions.
        asking: the token whose query and key summarise them, which may be missing; None where all are pooled.
    """

    tokens: tuple[int, ...]
    asking: int | None = None


class Partition(NamedTuple):
    """What one query attends.

    Attributes:
        direct: positions of tokens.
        regions: the others, each in one region.
    """

    direct: list[int]
    regions: list[Region]


class Pairs(NamedTuple):
    """How many pairs of a query and a key one head computes.

    Attributes:
        attended: of tokens with tokens and regions.
        summarised: of regions with their tokens.
        shared: those of both, whose scores are computed once.
    """

    attended: int
    summarised: int
    shared: int = 0


class Plan(ABC):
    """A factorisation plan.

    Attributes:
        bidirectional: whether everything may be split, and not only the past.
    """

    bidirectional = True

    @property
    def region_summary(self) -> RegionSummary:
        """How regions get their queries and keys."""
        return PooledSummary()

    def check_summarize(self, summarize: Summarize) -> None:
        """Raise ValueError for what this plan can't do with its regions; where they are pooled, there is nothing."""
        del summarize

    @property
    def merges_parts(self) -> bool:
        """Whether results of parts are merged, for which autograd keeps the result and its log-sum-exp.

        The layout of one token tells: a plan has parts at every length, or at none.
        """
        return bool(self.layout(1, causal=True).parts)

    @abstractmethod
    def unit(self, length: int) -> int:
        """Tokens by which a length is filled up."""

    @abstractmethod
    def partition(self, i: int, length: int, *, causal: bool) -> Partition:
        """What token i attends; together 0..i, or 0..length - 1, each once."""

    @abstractmethod
    def layout(self, length: int, *, causal: bool) -> Layout:
        """The partitions of all tokens of a positive multiple of the unit."""

    @abstractmethod
    def pairs(self, length: int, *, causal: bool) -> Pairs:
        """What the parts of `layout` add up to."""

    @property
    @abstractmethod
    def stream(self) -> StreamPlan:
        """The causal partitions, token by token."""


@dataclass(frozen=True)
class Fixed(Plan):
    """Segments: the own one directly, every other one as a region; causal: those before.

    Attributes:
        size: tokens of a segment.
    """

    size: int

    def __post_init__(self) -> None:
        """Check the size."""
        require_positive("Fixed", "size", self.size)

    def unit(self, length: int) -> int:
        """Whole segments."""
        return min(self.size, length)

    def partition(self, i: int, length: int, *, causal: bool) -> Partition:
        """By segments."""
        own, end = i // self.size, i + 1 if causal else length
        segments = [range(start, min(start + self.size, end)) for start in range(0, end, self.size)]
        regions = [Region(tuple(segment)) for number, segment in enumerate(segments) if number != own]
        return Partition(list(segments[own]), regions)

    def layout(self, length: int, *, causal: bool) -> Layout:
        """One summary for every segment that others see."""
        size = self.unit(length)
        blocks = Blocks(length // size, size, causal, Shared())
        regions = blocks.summarised

        def pool(x: Tensor, reduction: Reduction) -> Tensor:
            return reduction.along(x[:, : regions * size].unflatten(1, (regions, size)), 2)

        made = [Part(View(0, regions, 1, 1), (tokens(View(0, regions, size, size)),))] if regions else []
        return Layout(regions, pool, sizes_by(pool), made, [], blocks)

    def pairs(self, length: int, *, causal: bool) -> Pairs:
        """Own segment and all others, or those before."""
        size = self.unit(length)
        count = length // size
        if causal:
            return Pairs(count * size * (size + 1) // 2 + size * count * (count - 1) // 2, length - size)
        return Pairs(length * (size + count - 1), length if count > 1 else 0)

    @property
    def stream(self) -> StreamPlan:
        """Of earlier segments summaries are enough."""
        return StreamPlan(self.size, False, (Segments(self.size),), needs_all=False)


def require_positive(plan: str, name: str, value: int) -> None:
    """Raise ValueError for a size below 1."""
    if value < 1:
        raise ValueError(f"combiner_attention: {plan}({name}) must be at least 1, got {value}")
