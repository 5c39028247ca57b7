"""Values and their weights exp(k - peak), made once for all strips whose largest k lie near each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.means.running_means import Means
from subquad.ops.means.strip_geometry import Strip

FARTHEST = 30.0
"""How far above the peak a k may be: its weight, e^30, is still far from the largest number."""

SHARED = 4
"""Widths of a strip that are weighted together, for narrow strips few enough to stay in the cache."""


class Group(NamedTuple):
    """Strips whose columns are weighted together.

    Attributes:
        strips: their numbers.
        columns: those of all of them.
        peak: (B, G, 1, E or 1), what the columns are weighted relative to.
    """

    strips: range
    columns: slice
    peak: Tensor


class Columns(NamedTuple):
    """The columns of a group of strips.

    Attributes:
        all: the columns of all strips.
        peak: (B, G, 1, E or 1).
        weighted: (B, G, W, E + (E or 1)), values times weights, and weights.
    """

    all: slice
    peak: Tensor
    weighted: Tensor

    @classmethod
    def weigh(cls, k: Tensor, v: Tensor, group: Group) -> Columns:
        """Those of k (B, G, S, E or 1) and v (B, G, S, E)."""
        _, columns, peak = group
        weighted = v.new_empty((*v.shape[:2], columns.stop - columns.start, v.shape[3] + k.shape[3]))
        weights = (k[:, :, columns] - peak).exp_()  # exponentials of rows that don't lie together are slow
        torch.mul(v[:, :, columns], weights, out=weighted[..., : v.shape[3]])
        weighted[..., v.shape[3] :] = weights
        return cls(columns, peak, weighted)

    def of(self, strip: Strip, x: Tensor) -> Tensor:
        """The part of x (B, G, W, ·) that belongs to a strip."""
        return x[:, :, strip.columns.start - self.all.start : strip.columns.stop - self.all.start]

    def far(self, mean: Means) -> Tensor:
        """A mean of other columns as one more, (B, G, 1, E + (E or 1))."""
        weight = (mean.total - self.peak).exp_()
        return torch.cat((weight * mean.mean, weight), dim=3)

    def add_gradients_(self, gradients: tuple[Tensor, Tensor], of_weighted: Tensor) -> None:
        """Add to the gradients of k and v (B, G, S, ·) what those of the weighted columns bring."""
        of_k, of_v = (x[:, :, self.all] for x in gradients)
        width = of_v.shape[3]
        weights = self.weighted[..., width:]
        of_v.addcmul_(of_weighted[..., :width], weights)
        of_k += (self.weighted[..., :width] * of_weighted[..., :width]).sum_to_size(of_k.shape)
        of_k.addcmul_(of_weighted[..., width:], weights)


def column_groups(k: Tensor, strips: Sequence[Strip]) -> list[Group]:
    """All strips, as many together as their peaks allow.

    Args:
        k: (B, G, S, E or 1).
        strips: in order.
    """
    peaks = _peaks(k, strips)
    found: list[Group] = []
    first = 0
    while first < len(strips):
        last = first + 1
        while last < len(strips) and _go_together(strips, peaks, first, last):
            last += 1
        columns = slice(strips[first].columns.start, strips[last - 1].columns.stop)
        found.append(Group(range(first, last), columns, peaks[first]))
        first = last
    return found


def _go_together(strips: Sequence[Strip], peaks: Sequence[Tensor], first: int, last: int) -> bool:
    """Whether columns of a strip are weighted with those of an earlier one."""
    widest = SHARED * (strips[first].columns.stop - strips[first].columns.start)
    if strips[last].columns.stop - strips[first].columns.start > widest:
        return False
    return not bool((peaks[last] - peaks[first] > FARTHEST).any())


def _peaks(k: Tensor, strips: Sequence[Strip]) -> list[Tensor]:
    """The largest k that a query of each strip sees in each channel, (B, G, 1, E or 1); causal ones never fall."""
    if not strips[0].reach.causal:
        return [k.amax(dim=2, keepdim=True)] * len(strips)
    ends = [strip.columns.stop for strip in strips]
    blocks = zip([0, *ends[:-1]], ends, strict=True)
    return list(accumulate((k[:, :, slice(*block)].amax(dim=2, keepdim=True) for block in blocks), torch.maximum))
