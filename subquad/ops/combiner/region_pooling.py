"""Pooling the tokens of regions: elementwise maxima or sums over stretches, prefixes, and everything but one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Reduction(NamedTuple):
    """An associative, commutative operation.

    Attributes:
        neutral: what changes nothing.
        along: (x, dim) -> x without dim.
        running: (x, dim) -> results of everything up to each place.
        pair: of two tensors.
        neighbours: (G, N, 2, E) -> (G, N, E).
    """

    neutral: float
    along: Callable[[Tensor, int], Tensor]
    running: Callable[[Tensor, int], Tensor]
    pair: Callable[[Tensor, Tensor], Tensor]
    neighbours: Callable[[Tensor], Tensor]


class _Largest(torch.autograd.Function):
    """The maximum along a dimension, whose gradient goes to the first largest entry.

    torch's `max` finds places in the forward pass too, at the price of many maxima, and `amax` divides gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dim = dim
        return x.amax(dim=dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        (x,) = ctx.saved_tensors
        places = first_largest(x, ctx.dim).places.unsqueeze(ctx.dim)
        return torch.zeros_like(x).scatter_(ctx.dim, places, grad.unsqueeze(ctx.dim)), None


class Largest(NamedTuple):
    """Maxima along a dimension, which isn't there any more.

    Attributes:
        values: the maxima.
        places: int64, where each first stands.
    """

    values: Tensor
    places: Tensor


def first_largest(x: Tensor, dim: int) -> Largest:
    """Maxima and their places.

    torch finds places much slower than maxima. So maxima of stretches are taken first, and places in one stretch alone.
    """
    size = x.shape[dim]
    width = 1 << (size.bit_length() // 2)
    if size % width:
        return Largest(*x.max(dim=dim))
    stretches = x.unflatten(dim, (-1, width))
    values, number = stretches.amax(dim=dim + 1).max(dim=dim)
    index = number.unsqueeze(dim).expand(*number.shape[:dim], width, *number.shape[dim:]).unsqueeze(dim)
    return Largest(values, number * width + stretches.gather(dim, index).squeeze(dim).max(dim=dim).indices)


class _LargerOfPairs(torch.autograd.Function):
    """The larger of two neighbours along dimension 2, whose gradient goes to it, the first where they are equal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.maximum(x[:, :, 0], x[:, :, 1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] - as above
        (x,) = ctx.saved_tensors
        found = torch.empty_like(x)
        # one pass: the gradient where the second is larger
        of_second = torch.ops.aten.threshold_backward(grad, x[:, :, 1] - x[:, :, 0], 0.0)
        found[:, :, 1] = of_second
        torch.sub(grad, of_second, out=found[:, :, 0])
        return found


MAXIMUM = Reduction(
    -torch.inf,
    _Largest.apply,  # pyright: ignore[reportArgumentType] - apply has no types
    lambda x, dim: x.cummax(dim=dim).values,
    torch.maximum,
    _LargerOfPairs.apply,  # pyright: ignore[reportArgumentType] - as above
)

SUM = Reduction(
    0.0,
    lambda x, dim: x.sum(dim=dim),
    lambda x, dim: x.cumsum(dim=dim),
    torch.add,
    lambda x: x[:, :, 0] + x[:, :, 1],
)

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
    return reduction.neighbours(x.unflatten(1, (-1, 2)))
