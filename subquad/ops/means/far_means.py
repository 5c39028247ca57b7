"""Means over the columns that lie beyond the bias for all queries of a strip, one column in place of many.

Strips follow each other, so that each of these means is that of the neighbouring strip joined with a block of columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.means.running_means import Means
from subquad.ops.means.strip_geometry import Strip, blocks_before, blocks_behind

TOGETHER = 1024
"""Columns whose means are taken at once: few enough to stay in the cache."""


class Far(NamedTuple):
    """The far means of all strips, those behind from the last strip to the first.

    Attributes:
        before: blocks of columns that come to those before each strip.
        behind: the same behind.
        means_before: over them, (B, G, 1, ·); None for no column.
        means_behind: the same behind; empty where no query sees a later column.
    """

    before: Sequence[slice]
    behind: Sequence[slice]
    means_before: Sequence[Means | None]
    means_behind: Sequence[Means | None]

    @classmethod
    def of(cls, k: Tensor, v: Tensor, strips: Sequence[Strip]) -> Far:
        """All of them, of columns k (B, G, S, E or 1) and v (B, G, S, E)."""
        before = blocks_before(strips)
        behind = [] if strips[0].reach.causal else blocks_behind(strips, k.shape[2])
        return cls(before, behind, joined_means(k, v, before), joined_means(k, v, behind))

    def seen(self, strip: int) -> list[Means]:
        """What a strip sees far from it: one or two means, or none."""
        behind = self.means_behind[-1 - strip] if self.means_behind else None
        return [mean for mean in (self.means_before[strip], behind) if mean is not None]

    def add_gradients_(
        self, gradients: tuple[Tensor, Tensor], k: Tensor, v: Tensor, of_seen: Sequence[Sequence[Means]]
    ) -> None:
        """Add to the gradients of k and v what those of the means bring that each strip sees."""
        of_before = [found[0] if mean else None for found, mean in zip(of_seen, self.means_before, strict=True)]
        add_joined_gradients_(gradients, k, v, self.before, self.means_before, of_before)
        if self.behind:
            pairs = zip(reversed(of_seen), self.means_behind, strict=True)
            of_behind = [found[-1] if mean else None for found, mean in pairs]
            add_joined_gradients_(gradients, k, v, self.behind, self.means_behind, of_behind)


def joined_means(k: Tensor, v: Tensor, blocks: Sequence[slice]) -> list[Means | None]:
    """For each block the mean over all columns of it and the blocks before it; None for none.

    Args:
        k: (B, G, S, E or 1), logarithms of weights.
        v: (B, G, S, E).
        blocks: of columns, some of them empty.

    Returns:
        Means (B, G, 1, ·).
    """
    own: dict[int, Means] = {}
    for run in _runs(blocks):
        log_weights = run.of(k)
        top = log_weights.amax(dim=3, keepdim=True)
        weights = (log_weights - top).exp_()
        weight = weights.sum(dim=3, keepdim=True)
        total, mean = weight.log() + top, weights.mul(run.of(v)).sum(dim=3, keepdim=True) / weight
        own |= {i: Means(total[:, :, place], mean[:, :, place]) for place, i in enumerate(run.blocks)}
    return list(accumulate((own.get(i) for i in range(len(blocks))), _join))


def add_joined_gradients_(
    gradients: tuple[Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    blocks: Sequence[slice],
    means: Sequence[Means | None],
    of_means: Sequence[Means | None],
) -> None:
    """Add to the gradients of k and v what those of the means bring; other arguments as in `joined_means`.

    Args:
        gradients: of k and v.
        k: (B, G, S, E or 1).
        v: (B, G, S, E).
        blocks: of columns.
        means: the result of `joined_means`.
        of_means: gradients of totals and means, None where the mean is.
    """
    told = _told_back(means, of_means)
    for run in _runs(blocks):
        mean, of_mean = run.stacked(means), run.stacked(told)
        of_k, of_v = (run.of(gradient) for gradient in gradients)
        shares = (run.of(k) - mean.total).exp_()
        of_v.addcmul_(shares, of_mean.mean)
        of_logarithms = (run.of(v) - mean.mean).mul_(of_mean.mean).sum_to_size(shares.shape).add_(of_mean.total)
        of_k.addcmul_(shares, of_logarithms)


class _Run(NamedTuple):
    """Neighbouring blocks of one size, N of T columns.

    Attributes:
        blocks: their numbers.
        columns: those of all of them.
    """

    blocks: list[int]
    columns: slice

    def of(self, x: Tensor) -> Tensor:
        """The part of x (B, G, S, ·) as (B, G, N, T, ·)."""
        return x[:, :, self.columns].unflatten(2, (len(self.blocks), -1))

    def stacked(self, means: Sequence[Means | None]) -> Means:
        """The means of all blocks, (B, G, N, 1, ·)."""
        present = [mean for i in self.blocks if (mean := means[i]) is not None]
        return Means(*(torch.stack(tensors, dim=2) for tensors in zip(*present, strict=True)))


def _runs(blocks: Sequence[slice]) -> Iterator[_Run]:
    """Blocks that aren't empty, several together where of one size; they stand in the order of their columns."""
    places = sorted((block.start, block.stop, i) for i, block in enumerate(blocks) if block.start < block.stop)
    for size, run in groupby(places, key=lambda place: place[1] - place[0]):
        equal, count = list(run), max(1, TOGETHER // size)
        for first in range(0, len(equal), count):
            starts, stops, numbers = zip(*equal[first : first + count], strict=True)
            yield _Run(list(numbers), slice(starts[0], stops[-1]))


def _told_back(means: Sequence[Means | None], of_means: Sequence[Means | None]) -> list[Means | None]:
    """Gradients of the means with what each gets through the next ones, in which it is joined with a block."""
    told, later = list(of_means), None
    for i in reversed(range(len(means))):
        mean, own = means[i], of_means[i]
        if mean is None or own is None:
            continue
        if later is not None:
            joined, of_joined = later
            share = (mean.total - joined.total).exp_()
            of_mean = share * of_joined.mean
            of_total = (of_mean * (mean.mean - joined.mean)).sum_to_size(share.shape)
            own = Means(own.total + of_total.addcmul_(share, of_joined.total), own.mean + of_mean)
        told[i], later = own, (mean, own)
    return told


def _join(first: Means | None, second: Means | None) -> Means | None:
    """The mean of what two means are of."""
    if first is None or second is None:
        return first or second
    total = torch.logaddexp(first.total, second.total)
    share = (second.total - total).exp_()
    return Means(total, torch.lerp(first.mean, second.mean, share.expand_as(first.mean)))
