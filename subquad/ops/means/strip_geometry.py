"""Strips of queries, and the columns of each that a bias reaches; those of one size are handled together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

SHORTEST, LONGEST = 32, 512
"""Queries of a strip: as many as the bias reaches columns, within these bounds."""

WHOLE = 16
"""Columns of a strip are a multiple of this where there are enough, since products of odd widths are slower."""


class BiasReach(NamedTuple):
    """How far the bias reaches, and what is seen.

    Attributes:
        left: columns before a query; None for all.
        right: columns after it; None for all, 0 in causal means.
        causal: no column after a query is seen; else those beyond `right` are, without a bias.
    """

    left: int | None
    right: int | None
    causal: bool


class Strips(NamedTuple):
    """Rectangles of one size, R queries by W columns, each R queries and R columns further than the one before.

    Attributes:
        numbers: which of all strips these are, N of them.
        queries: those of all of them.
        columns: those that one of the queries sees with a bias, and some more before them.
        offset: query i is column `offset` + i.
        reach: of the bias.
        before: whether there are columns before those of each strip, which its queries see without a bias.
        behind: the same behind.
    """

    numbers: range
    queries: slice
    columns: slice
    offset: int
    reach: BiasReach
    before: bool = False
    behind: bool = False

    @property
    def rows(self) -> int:
        """R, queries of a strip."""
        return (self.queries.stop - self.queries.start) // len(self.numbers)

    @property
    def width(self) -> int:
        """W, columns of a strip."""
        return self.columns.stop - self.columns.start - (len(self.numbers) - 1) * self.rows

    @property
    def pairs(self) -> int:
        """All of the rectangles."""
        return len(self.numbers) * self.rows * self.width

    def single(self, i: int) -> Strips:
        """The strip with this place among them."""
        first_query, first_column = (x.start + i * self.rows for x in (self.queries, self.columns))
        queries = slice(first_query, first_query + self.rows)
        columns = slice(first_column, first_column + self.width)
        return self._replace(numbers=self.numbers[i : i + 1], queries=queries, columns=columns)

    def singles(self) -> Iterator[Strips]:
        """One after the other."""
        return map(self.single, range(len(self.numbers)))

    def of_queries(self, x: Tensor) -> Tensor:
        """The part (B, G, N, R, ·) of x (B, G, L, ·)."""
        return x[:, :, self.queries].unflatten(2, (len(self.numbers), self.rows))

    def of_columns(self, x: Tensor) -> Tensor:
        """The part (B, G, N, W, ·) of x (B, G, S, ·), columns of two strips twice; not to be written to."""
        return x[:, :, self.columns].unfold(2, self.width, self.rows).mT

    def limit_(self, scores: Tensor) -> Tensor:
        """Scores (·, ·, ·, R, W) without those beyond the reach, which are set to 0; in place."""
        own = self.offset + self.queries.start - self.columns.start
        columns_first = scores.mT.is_contiguous()  # triangles of matrices that don't lie row by row take a slow way
        if (left := self.reach.left) is not None:
            scores.mT.tril_(left - own) if columns_first else scores.triu_(own - left)
        if (right := self.reach.right) is not None and not self.reach.causal:
            scores.mT.triu_(-own - right) if columns_first else scores.tril_(own + right)
        return scores

    def hide_(self, scores: Tensor) -> Tensor:
        """Scores (·, ·, ·, R, W) with -inf for unseen pairs; in place. The last R columns are then the queries."""
        if self.reach.causal:
            later = torch.ones(self.rows, self.rows, dtype=torch.bool, device=scores.device).triu_(1)
            scores[..., self.width - self.rows :].masked_fill_(later, -torch.inf)
        return scores

    def goes_on_with(self, strip: Strips) -> bool:
        """Whether the next strip is one more of these."""
        same = (self.rows, self.width, self.before, self.behind) == (
            strip.rows,
            strip.width,
            strip.before,
            strip.behind,
        )
        return same and strip.columns.stop == self.columns.stop + self.rows


def strips(length: int, total: int, reach: BiasReach) -> list[Strips]:
    """The strips of `length` queries, the last of `total` columns, one by one."""
    left, right, causal = reach
    reached = total if left is None or right is None else left + right + 1
    size, offset = _size(reached), total - length
    found: list[Strips] = []
    begin = 0
    for number, first in enumerate(range(0, length, size)):
        last = min(first + size, length)
        end = total if right is None else min(total, offset + last + right)
        width = end if left is None else end - (offset + first - left)
        begin = max(begin, end + -width // WHOLE * WHOLE)
        queries, columns = slice(first, last), slice(begin, end)
        found.append(
            Strips(range(number, number + 1), queries, columns, offset, reach, begin > 0, not causal and end < total)
        )
    return found


def count_pairs(length: int, reach: BiasReach) -> int:
    """Pairs of all strips of `length` queries and as many columns.

    Where the reach is bounded, all strips but those at the ends are alike, so that they are counted and not listed.
    """

    def listed(size: int) -> int:
        return sum(strip.pairs for strip in strips(size, size, reach))

    if reach.left is None or reach.right is None or not length:
        return listed(length)
    size = _size(reach.left + reach.right + 1)
    ends = 2 * size * (4 + (reach.left + reach.right) // size)  # queries of both ends, with room to spare
    repeated = max(0, length - ends) // size
    shorter = length - repeated * size
    return listed(shorter) + (repeated * (listed(shorter + size) - listed(shorter)) if repeated else 0)


def _size(reached: int) -> int:
    """Queries of a strip that reaches so many columns."""
    return min(LONGEST, max(SHORTEST, 1 << (reached - 1).bit_length()))


def together(singles: Sequence[Strips]) -> list[Strips]:
    """Neighbours of one size as one."""
    found: list[Strips] = []
    for strip in singles:
        if found and found[-1].goes_on_with(strip):
            last = found[-1]
            numbers = range(last.numbers.start, strip.numbers.stop)
            queries = slice(last.queries.start, strip.queries.stop)
            columns = slice(last.columns.start, strip.columns.stop)
            found[-1] = last._replace(numbers=numbers, queries=queries, columns=columns)
        else:
            found.append(strip)
    return found


def blocks_before(singles: Sequence[Strips]) -> list[slice]:
    """For each strip the columns before its own that weren't before those of the last strip."""
    begins = [0, *(strip.columns.start for strip in singles)]
    return [slice(start, stop) for start, stop in pairwise(begins)]


def blocks_behind(singles: Sequence[Strips], total: int) -> list[slice]:
    """For each strip the columns behind its own that aren't behind those of the next strip; `total` counts all."""
    ends = [*(strip.columns.stop for strip in singles), total]
    return [slice(start, stop) for start, stop in pairwise(ends)]
