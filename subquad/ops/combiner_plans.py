"""Plans: how the past of every token, or everything, is split into tokens attended directly and disjoint regions.

A plan states the partition of each token, which is its definition, and lays all of them out as parts of rectangles.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.rectangles import SUMMARIES, TOKENS, Gather, Keys, Part, View
from subquad.ops.region_pooling import SUM, Pool, Reduction, halve

SMALLEST_LEVEL = 5
"""Regions of up to 2^4 tokens lie inside blocks of 2^5 queries, which share the larger ones."""


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


class Layout(NamedTuple):
    """A plan for a length, which is a multiple of its unit.

    Attributes:
        regions: R, different regions.
        pool: queries or keys of tokens to those of regions.
        sizes: how many of the tokens that are marked 1 (1, L, 1) are in each region, (R,).
        summaries: parts with regions for rows and tokens for keys.
        parts: parts with tokens for rows; the first has all of them.
    """

    regions: int
    pool: Pool
    sizes: Callable[[Tensor], Tensor]
    summaries: list[Part]
    parts: list[Part]


class Plan(ABC):
    """A factorisation plan."""

    bidirectional = True
    asks_tokens = False
    """Whether regions are summarised by the queries of single tokens, so that nothing is pooled."""

    @abstractmethod
    def unit(self, length: int) -> int:
        """Tokens by which a length is filled up."""

    @abstractmethod
    def partition(self, i: int, length: int, *, causal: bool) -> Partition:
        """What token i attends; together 0..i, or 0..length - 1, each once."""

    @abstractmethod
    def layout(self, length: int, *, causal: bool) -> Layout:
        """The partitions of all tokens of a positive multiple of the unit."""


def tokens(view: View) -> Keys:
    """Token columns."""
    return Keys(TOKENS, view)


def summaries(rows: View | Gather) -> Keys:
    """Summary columns."""
    return Keys(SUMMARIES, rows)


def sizes_by(pool: Pool) -> Callable[[Tensor], Tensor]:
    """Sizes where a region is what is pooled."""
    return lambda kept: pool(kept, SUM)[0, :, 0]


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
        """Own segment and summaries side by side; causal: groups of segments see the summaries before their last."""
        size = self.unit(length)
        count = length // size
        regions = count - 1 if causal or count == 1 else count
        own = View(0, count, size, size)

        def pool(x: Tensor, reduction: Reduction) -> Tensor:
            return reduction.along(x[:, : regions * size].unflatten(1, (regions, size)), 2)

        made = [Part(View(0, regions, 1, 1), (tokens(own.cut(0, regions)),))] if regions else []
        if causal:
            parts = [Part(own, (tokens(own),), causal=True), *_earlier_segments(count, size)]
        else:
            other = ~torch.eye(count, dtype=torch.bool)[:, None, None]
            visible = torch.cat((torch.ones(count, 1, 1, size, dtype=torch.bool), other), dim=3)
            shared = summaries(View(0, count, 0, count))
            parts = [Part(own, (tokens(own), shared), visible) if regions else Part(own, (tokens(own),))]
        return Layout(regions, pool, sizes_by(pool), made, parts)


def _earlier_segments(count: int, size: int, group: int = 8) -> list[Part]:
    """Segments 1..count-1 against the summaries before them, a group at a time."""
    parts = []
    for first in range(1, count, group):
        stop = min(first + group, count)
        visible = torch.arange(stop - 1) < torch.arange(first, stop)[:, None]
        rows, columns = View(first * size, stop - first, size, size), View(0, stop - first, 0, stop - 1)
        parts.append(Part(rows, (summaries(columns),), visible[:, None, None]))
    return parts


@dataclass(frozen=True)
class Logsparse(Plan):
    """Aligned blocks of doubling size: the token itself, and of every size the block beside its own; causal: before."""

    def unit(self, length: int) -> int:
        """The blocks of queries that share their larger regions."""
        return 1 << min(SMALLEST_LEVEL, (length - 1).bit_length())

    def partition(self, i: int, length: int, *, causal: bool) -> Partition:
        """The sibling of the token's block on every level, cut off at the end; on the lowest that is a token."""
        siblings = []
        for level in range((length - 1).bit_length()):
            sibling = (i >> level) ^ 1
            block = range(sibling << level, min((sibling + 1) << level, length))
            siblings.append([] if causal and sibling << level > i else list(block))
        direct = [i, *(siblings[0] if siblings else [])]
        return Partition(direct, [Region(tuple(block)) for block in siblings[1:] if block])

    def layout(self, length: int, *, causal: bool) -> Layout:
        """Blocks of queries against their own tokens, the small regions among these, and a list of larger ones."""
        block = self.unit(length)
        small, large = _SmallRegions(block, causal), _LargeRegions(length // block, block, causal)
        count, inside = length // block, len(small.levels)
        offset = count * inside

        def pool(x: Tensor, reduction: Reduction) -> Tensor:
            found, level = [], x
            for power in range(1, block.bit_length() - 1):
                level = halve(level, reduction)
                found.append(level.unflatten(1, (count, block >> power))[:, :, :: 2 if causal else 1])
            if block > 1:
                level = halve(level, reduction)
            pooled = [torch.cat(found, dim=2).flatten(1, 2)] if found else [x[:, :0]]
            for ids in large.ids:
                pooled.append(level[:, ids.start : ids.stop : ids.step])
                level = halve(level, reduction)
            return torch.cat(pooled, dim=1)

        own = View(0, count, block, block)
        keys, visible = [tokens(own)], [small.direct[None].expand(count, -1, -1)]
        made = []
        if inside:
            own_regions = View(0, count, inside, inside)
            made.append(Part(own_regions, (tokens(own),), small.members[None, None]))
            keys.append(summaries(own_regions))
            visible.append(small.seen[None].expand(count, -1, -1))
        if large.ids:
            index, seen = large.table()
            keys.append(summaries(Gather(index + offset)))
            visible.append(seen[:, None].expand(-1, block, -1))
        parts = [Part(own, tuple(keys), torch.cat(visible, dim=2)[:, None])]
        made += large.parts(offset)
        return Layout(offset + large.number, pool, sizes_by(pool), made, parts)


class _SmallRegions:
    """Regions of 2 to size / 2 tokens inside a block, level by level.

    Attributes:
        levels: level of each region.
        members: bool (regions, size), the tokens of each.
        seen: bool (size, regions), which of them each query sees.
        direct: bool (size, size), the query itself and the token beside it.
    """

    def __init__(self, size: int, causal: bool) -> None:
        step, place = 2 if causal else 1, torch.arange(size)
        pairs = [(level, u) for level in range(1, size.bit_length() - 1) for u in range(0, size >> level, step)]
        self.levels = [level for level, _ in pairs]
        level, number = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
        self.members = (place >> level[:, None]) == number[:, None]
        self.seen = ((place[:, None] >> level) ^ 1) == number
        self.direct = (place == place[:, None]) | (place == (place ^ 1)[:, None])
        if causal:
            self.direct &= place <= place[:, None]


class _LargeRegions:
    """Regions of one block or more, level by level.

    Attributes:
        ids: numbers of the regions of each level.
        number: of all regions.
    """

    def __init__(self, count: int, block: int, causal: bool) -> None:
        self.count, self.block, self.causal = count, block, causal
        self.ids: list[range] = []
        for level in range((count - 1).bit_length()):
            paired = -(-count // (1 << level)) & ~1  # the last one without a sibling is nobody's region
            self.ids.append(range(0, paired, 2 if causal else 1))
        self.number = sum(map(len, self.ids))

    def parts(self, offset: int) -> list[Part]:
        """One row for each region, the last of a level alone where it is cut off."""
        parts = []
        for level, ids in enumerate(self.ids):
            size = self.block << level
            last = min(size, self.count * self.block - ids[-1] * size)
            whole = len(ids) if last == size else len(ids) - 1
            if whole:
                rows = View(offset, whole, 1, 1)
                parts.append(Part(rows, (tokens(View(0, whole, ids.step * size, size)),)))
            if whole < len(ids):
                rows = View(offset + whole, 1, 1, 1)
                parts.append(Part(rows, (tokens(View(ids[-1] * size, 1, size, last)),)))
            offset += len(ids)
        return parts

    def table(self) -> tuple[Tensor, Tensor]:
        """Region of every block (rows) on every level (columns), int64, and whether it has one."""
        index, seen, offset = [], [], 0
        for level, ids in enumerate(self.ids):
            sibling = (torch.arange(self.count) >> level) ^ 1
            place = torch.div(sibling, ids.step, rounding_mode="floor")
            exists = (sibling % ids.step == 0) & (place < len(ids))
            index.append(torch.where(exists, place + offset, 0))
            seen.append(exists)
            offset += len(ids)
        return torch.stack(index, dim=1), torch.stack(seen, dim=1)


def require_positive(plan: str, name: str, value: int) -> None:
    """Raise ValueError for a size below 1."""
    if value < 1:
        raise ValueError(f"combiner_attention: {plan}({name}) must be at least 1, got {value}")
