"""The plan of aligned blocks whose sizes double: logarithmically many regions for every token.

Regions smaller than a block of queries lie inside it, and are seen by some of its queries; all of its queries see the
same larger ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.ops.combiner.layout import Layout, sizes_by, summaries, tokens
from subquad.ops.combiner.plans import Pairs, Partition, Plan, Region
from subquad.ops.combiner.region_pooling import Reduction, halve
from subquad.ops.combiner.stream_regions import DoublingBlocks, StreamPlan
from subquad.ops.rectangles import Gather, Part, View

BLOCK_LEVEL = 5
"""Blocks of queries have 2^5 tokens."""


@dataclass(frozen=True)
class Logsparse(Plan):
    """Aligned blocks of doubling size: the token itself, and of every size the block beside its own; causal: before."""

    def unit(self, length: int) -> int:
        """The blocks of queries that share their larger regions."""
        return 1 << min(BLOCK_LEVEL, (length - 1).bit_length())

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

    def pairs(self, length: int, *, causal: bool) -> Pairs:
        """A region for every set bit of a position; both ways, one for every level on which the token has a sibling."""
        small = self.unit(length).bit_length() - 1  # levels inside a block
        attended, summarised = length, 0
        for level in range((length - 1).bit_length()):
            size = 1 << level
            paired = -(-length // size) & ~1
            seeing = paired // 2 * size if level < small else min(length, paired * size) - paired // 2 * size
            attended += seeing if causal else min(length, paired * size)
            if level:
                summarised += paired // 2 * size if causal else min(length, paired * size)
        return Pairs(attended, summarised)

    @property
    def stream(self) -> StreamPlan:
        """Pairs of tokens, and larger blocks, which need the tokens of smaller ones again."""
        return StreamPlan(2, False, (DoublingBlocks(),))


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
