"""Pooling the tokens of regions: elementwise maxima or sums over stretches, prefixes, and everything but one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Reduction(NamedTuple):
    """An associative, commutative operation.

    Attributes:
        neutral: what changes nothing.
        along: (x, dim) -> x without dim.
        running: (x, dim) -> results of everything up to each place.
        pair: of two tensors.
    """

    neutral: float
    along: Callable[[Tensor, int], Tensor]
    running: Callable[[Tensor, int], Tensor]
    pair: Callable[[Tensor, Tensor], Tensor]


MAXIMUM = Reduction(
    -torch.inf, lambda x, dim: x.max(dim=dim).values, lambda x, dim: x.cummax(dim=dim).values, torch.maximum
)
"""Its gradient goes to the first largest entry along a dimension."""

SUM = Reduction(0.0, lambda x, dim: x.sum(dim=dim), lambda x, dim: x.cumsum(dim=dim), torch.add)

Pool = Callable[[Tensor, Reduction], Tensor]
"""Tokens (G, L, E) to regions (G, R, E)."""


def before(x: Tensor, reduction: Reduction, dim: int) -> Tensor:
    """What comes before each place along a dimension; the neutral element at the first."""
    size = x.shape[dim]
    first = torch.full_like(x.narrow(dim, 0, 1), reduction.neutral)
    return torch.cat((first, reduction.running(x.narrow(dim, 0, size - 1), dim)), dim=dim)


def after(x: Tensor, reduction: Reduction, dim: int) -> Tensor:
    """What comes after each place along a dimension; the neutral element at the last."""
    return before(x.flip(dim), reduction, dim).flip(dim)


def others(x: Tensor, reduction: Reduction, dim: int) -> Tensor:
    """Everything along a dimension but each place itself."""
    return reduction.pair(before(x, reduction, dim), after(x, reduction, dim))


def halve(x: Tensor, reduction: Reduction) -> Tensor:
    """Neighbouring pairs along dimension 1; an odd last one stays alone."""
    if x.shape[1] % 2:
        last = torch.full_like(x[:, :1], reduction.neutral)
        x = torch.cat((x, last), dim=1)
    return reduction.along(x.unflatten(1, (-1, 2)), 2)
