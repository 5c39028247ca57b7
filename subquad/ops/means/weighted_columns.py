"""Values and their weights exp(k - peak), made once for all strips whose largest k lie near each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.means.running_means import Means
from subquad.ops.means.strip_geometry import Strips, together

FARTHEST = 30.0
"""How far above the peak a k may be: its weight, e^30, is still far from the largest number."""

SHARED = 4
"""Widths of a strip that are weighted together, for narrow strips few enough to stay in the cache."""


class Group(NamedTuple):
    """Strips whose columns are weighted together.

    Attributes:
        strips: neighbours of one size as one.
        queries: those of all of them.
        columns: likewise.
        peak: (B, G, 1, E or 1), what the columns are weighted relative to.
    """

    strips: list[Strips]
    queries: slice
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
        columns, peak = group.columns, group.peak
        weighted = v.new_empty((*v.shape[:2], columns.stop - columns.start, v.shape[3] + k.shape[3]))
        weights = (k[:, :, columns] - peak).exp_()  # exponentials of rows that don't lie together are slow
        torch.mul(v[:, :, columns], weights, out=weighted[..., : v.shape[3]])
        weighted[..., v.shape[3] :] = weights
        return cls(columns, peak, weighted)

    def of(self, strip: Strips, x: Tensor) -> Tensor:
        """The part of x (B, G, W, ·) that belongs to a single strip."""
        return x[:, :, strip.columns.start - self.all.start : strip.columns.stop - self.all.start]

    def far(self, mean: Means) -> Tensor:
        """Means of other columns as one more each, (B, G, N, E + (E or 1))."""
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


def column_groups(k: Tensor, singles: Sequence[Strips]) -> list[Group]:
    """All strips, as many together as their peaks allow.

    Args:
        k: (B, G, S, E or 1).
        singles: in order.
    """
    peaks = _peaks(k, singles)
    found: list[Group] = []
    first = 0
    while first < len(singles):
        widest = SHARED * singles[first].width
        fitting = [strip for strip in singles[first:] if strip.columns.stop - singles[first].columns.start <= widest]
        rise = peaks[:, :, first : first + len(fitting)] - peaks[:, :, first, None]
        higher = (rise > FARTHEST).any(dim=3).any(dim=1).any(dim=0).tolist()
        strips = fitting[: higher.index(True)] if True in higher else fitting
        queries = slice(strips[0].queries.start, strips[-1].queries.stop)
        columns = slice(strips[0].columns.start, strips[-1].columns.stop)
        found.append(Group(together(strips), queries, columns, peaks[:, :, first, None]))
        first += len(strips)
    return found


def _peaks(k: Tensor, singles: Sequence[Strips]) -> Tensor:
    """The largest k that a query of each strip sees in each channel, (B, G, N, E or 1); causal ones never fall."""
    if not singles[0].reach.causal:
        return k.amax(dim=2, keepdim=True).expand(-1, -1, len(singles), -1)
    begin, size = singles[0].columns.stop, singles[0].rows
    whole = (k.shape[2] - begin) // size
    end = begin + whole * size
    highest = [k[:, :, :begin].amax(dim=2, keepdim=True), k[:, :, begin:end].unflatten(2, (whole, size)).amax(dim=3)]
    if end < k.shape[2]:
        highest.append(k[:, :, end:].amax(dim=2, keepdim=True))
    return torch.cat(highest, dim=2).cummax(dim=2).values
