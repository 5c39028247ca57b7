"""Strips of queries, and the columns of each that a bias reaches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SHORTEST, LONGEST = 32, 512
"""Queries of a strip: as many as the bias reaches columns, within these bounds."""

WHOLE = 16
"""Columns of a strip are a multiple of this where there are enough, since products of odd widths are slower."""


class Reach(NamedTuple):
    """How far the bias reaches, and what is seen.

    Attributes:
        left: columns before a query; None for all.
        right: columns after it; None for all, 0 in causal means.
        causal: no column after a query is seen; else those beyond `right` are, without a bias.
    """

    left: int | None
    right: int | None
    causal: bool


class Strip(NamedTuple):
    """A rectangle of pairs.

    Attributes:
        queries: which.
        columns: those that one of the queries sees with a bias, and some more before them.
        offset: query i is column `offset` + i.
        reach: of the bias.
    """

    queries: slice
    columns: slice
    offset: int
    reach: Reach

    @property
    def pairs(self) -> int:
        """All of the rectangle."""
        return (self.queries.stop - self.queries.start) * (self.columns.stop - self.columns.start)

    def limit_(self, scores: Tensor) -> Tensor:
        """Scores (·, ·, R, W) without those beyond the reach, which are set to 0; in place."""
        own = self.offset + self.queries.start - self.columns.start
        columns_first = scores.mT.is_contiguous()  # triangles of matrices that don't lie row by row take a slow way
        if (left := self.reach.left) is not None:
            scores.mT.tril_(left - own) if columns_first else scores.triu_(own - left)
        if (right := self.reach.right) is not None and not self.reach.causal:
            scores.mT.triu_(-own - right) if columns_first else scores.tril_(own + right)
        return scores

    def hide_(self, scores: Tensor) -> Tensor:
        """Scores (·, ·, R, W) with -inf for unseen pairs; in place. The last R columns are then the queries."""
        if self.reach.causal:
            rows = scores.shape[2]
            later = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu_(1)
            scores[..., scores.shape[3] - rows :].masked_fill_(later, -torch.inf)
        return scores


def strips(length: int, total: int, reach: Reach) -> list[Strip]:
    """The strips of `length` queries, the last of `total` columns."""
    left, right, _ = reach
    reached = total if left is None or right is None else left + right + 1
    size, offset = min(LONGEST, max(SHORTEST, 1 << (reached - 1).bit_length())), total - length
    found: list[Strip] = []
    begin = 0
    for first in range(0, length, size):
        last = min(first + size, length)
        end = total if right is None else min(total, offset + last + right)
        width = end if left is None else end - (offset + first - left)
        begin = max(begin, end + -width // WHOLE * WHOLE)
        found.append(Strip(slice(first, last), slice(begin, end), offset, reach))
    return found


def blocks_before(all_strips: Sequence[Strip]) -> list[slice]:
    """For each strip the columns before its own that weren't before those of the last strip."""
    begins = [strip.columns.start for strip in all_strips]
    return [slice(start, stop) for start, stop in zip([0, *begins[:-1]], begins, strict=True)]


def blocks_behind(all_strips: Sequence[Strip], total: int) -> list[slice]:
    """The same behind, from the last strip to the first; `total` counts all columns."""
    ends = [strip.columns.stop for strip in reversed(all_strips)]
    return [slice(start, stop) for start, stop in zip(ends, [total, *ends[:-1]], strict=True)]
