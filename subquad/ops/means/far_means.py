"""Means over the columns that lie beyond the bias for all queries of a strip, one column in place of many.

Strips follow each other, so that each of these means is that of the neighbouring strip joined with a block of columns:
they are running means over blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.means.running_means import LOG_ZERO, Means, fading_sums_, running_means
from subquad.ops.means.strip_geometry import Strips, blocks_before, blocks_behind

TOGETHER = 1024
"""Columns that are summed at once: few enough to stay in the cache."""


class Side(NamedTuple):
    """The far means of all strips on one side.

    Attributes:
        blocks: of columns, for each strip those that come to the means of the neighbour closer to the end.
        from_the_end: whether the last strip is the one with the fewest of them, and not the first.
        means: of all strips, or their gradients, (B, G, N, ·); `LOG_ZERO` weighs a mean of no column.
    """

    blocks: Sequence[slice]
    from_the_end: bool
    means: Means

    @classmethod
    def of(cls, k: Tensor, v: Tensor, blocks: Sequence[slice], *, from_the_end: bool) -> Side:
        """Those of columns k (B, G, S, E or 1), logarithms of weights, and v (B, G, S, E)."""
        total = k.new_full((*k.shape[:2], len(blocks), k.shape[3]), LOG_ZERO)
        mean = v.new_zeros((*v.shape[:2], len(blocks), v.shape[3]))
        for run in _runs(blocks):
            log_weights = run.of(k)
            top = log_weights.amax(dim=3, keepdim=True)
            weights = (log_weights - top).exp_()
            weight = weights.sum(dim=3, keepdim=True)
            total[:, :, run.blocks] = (weight.log() + top).squeeze(3)
            mean[:, :, run.blocks] = (weights.mul(run.of(v)).sum(dim=3, keepdim=True) / weight).squeeze(3)
        joined = running_means(*_turned((total, mean), turn=from_the_end))
        return cls(blocks, from_the_end, Means(*_turned(joined, turn=from_the_end)))

    def seen(self, strips: Strips) -> Means:
        """What some strips see, (B, G, N, ·)."""
        return Means(*(x[:, :, strips.numbers.start : strips.numbers.stop] for x in self.means))

    def add_gradients_(self, gradients: tuple[Tensor, Tensor], k: Tensor, v: Tensor, of_means: Means) -> None:
        """Add to the gradients of k and v what those of the means bring."""
        of_weights = (of_means.mean * self.means.mean).sum_to_size(self.means.total.shape).sub_(of_means.total)
        levels, *of_sums = _turned((self.means.total, of_means.mean, of_weights), turn=self.from_the_end)
        summed = _turned(fading_sums_(levels, *of_sums, backwards=True), turn=self.from_the_end)
        for run in _runs(self.blocks):
            of_k, of_v = (run.of(gradient) for gradient in gradients)
            level, of_mean, of_weight = (x[:, :, run.blocks, None] for x in (self.means.total, *summed))
            shares = (run.of(k) - level).exp_()
            of_v.addcmul_(shares, of_mean)
            of_k.addcmul_(shares, (run.of(v) * of_mean).sum_to_size(shares.shape).sub_(of_weight))


class Far(NamedTuple):
    """The far means of all strips.

    Attributes:
        before: those over columns before a strip's own; None where no strip has any.
        behind: the same behind.
    """

    before: Side | None
    behind: Side | None

    @classmethod
    def of(cls, k: Tensor, v: Tensor, singles: Sequence[Strips]) -> Far:
        """All of them, of columns k (B, G, S, E or 1) and v (B, G, S, E)."""
        before, behind = blocks_before(singles), blocks_behind(singles, k.shape[2])
        return cls(
            Side.of(k, v, before, from_the_end=False) if singles[-1].before else None,
            Side.of(k, v, behind, from_the_end=True) if singles[0].behind else None,
        )

    def seen(self, strips: Strips) -> list[Means]:
        """What some strips see far from them, (B, G, N, ·): one or two means each, or none."""
        sides = ((self.before, strips.before), (self.behind, strips.behind))
        return [side.seen(strips) for side, sees in sides if side and sees]

    def zeros(self) -> Far:
        """Gradients of all means, to be added to."""
        cleared = (side and side._replace(means=Means(*map(torch.zeros_like, side.means))) for side in self)
        return Far(*cleared)

    def add_gradients_(self, gradients: tuple[Tensor, Tensor], k: Tensor, v: Tensor, of_far: Far) -> None:
        """Add to the gradients of k and v what those of the means bring."""
        for side, of_side in zip(self, of_far, strict=True):
            if side and of_side:
                side.add_gradients_(gradients, k, v, of_side.means)


class _Run(NamedTuple):
    """Neighbouring blocks of one size, N of T columns.

    Attributes:
        blocks: which.
        columns: those of all of them.
    """

    blocks: slice
    columns: slice

    def of(self, x: Tensor) -> Tensor:
        """The part of x (B, G, S, ·) as (B, G, N, T, ·)."""
        return x[:, :, self.columns].unflatten(2, (self.blocks.stop - self.blocks.start, -1))


def _runs(blocks: Sequence[slice]) -> Iterator[_Run]:
    """Blocks that aren't empty, several together where of one size."""
    for size, run in groupby(range(len(blocks)), key=lambda i: blocks[i].stop - blocks[i].start):
        equal = list(run)
        count = max(1, TOGETHER // max(1, size))
        for first in equal[::count] if size else ():
            last = min(first + count - 1, equal[-1])
            yield _Run(slice(first, last + 1), slice(blocks[first].start, blocks[last].stop))


def _turned(tensors: Sequence[Tensor], *, turn: bool) -> tuple[Tensor, ...]:
    """The last strip first, if so."""
    return tuple(x.flip(2) if turn else x for x in tensors)
