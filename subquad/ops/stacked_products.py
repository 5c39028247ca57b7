"""Products of stacks of matrices: one after the other where each is large enough for oneDNN, together where not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from subquad.ops.onednn import SMALLEST_PRODUCT, add_product_, outruns_mm, product, suits

SMALLEST_OF_SEVERAL = 2 * SMALLEST_PRODUCT
"""Multiplications of each of several products below which a batched one is faster, which nothing puts together."""


def stacked_product(a: Tensor, b: Tensor) -> Tensor:
    """The products a b.

    Args:
        a: (..., M, K).
        b: (..., K, N), as many dimensions; extents of 1 in front are repeated.

    Returns:
        (..., M, N).
    """
    stacks = _stacks(a, b)
    if not _large(a, b, stacks):
        return a @ b
    if math.prod(stacks) == 1:
        return product(_only(a), _only(b).mT).view(*stacks, a.shape[-2], b.shape[-1])
    found = [product(one, other.mT) for one, other in _pairs(a, b, stacks)]
    return torch.stack(found).view(*stacks, a.shape[-2], b.shape[-1])


def add_stacked_product_(target: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the products a b to the target (..., M, N); a and b as in `stacked_product`."""
    stacks = _stacks(a, b)
    if not _large(a, b, stacks):
        target += a @ b
        return
    if math.prod(stacks) == 1:
        add_product_(_only(target), _only(a), _only(b).mT)
        return
    for index, (one, other) in zip(_indices(stacks), _pairs(a, b, stacks), strict=True):
        add_product_(target[index], one, other.mT)


def _large(a: Tensor, b: Tensor, stacks: tuple[int, ...]) -> bool:
    several = math.prod(stacks) > 1
    if several and not outruns_mm():
        return False
    smallest = SMALLEST_OF_SEVERAL if several else SMALLEST_PRODUCT
    return a.shape[-2] * a.shape[-1] * b.shape[-1] >= smallest and suits(a, b)


def _only(x: Tensor) -> Tensor:
    """The only matrix of a stack, in one step: steps count where products are small."""
    return x.view(x.shape[-2:])


def _pairs(a: Tensor, b: Tensor, stacks: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """The matrices that belong together, stack by stack."""
    a, b = (x.expand(*stacks, -1, -1) for x in (a, b))
    return ((a[index], b[index]) for index in _indices(stacks))


def _indices(stacks: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, stacks))


def _stacks(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """Extents in front; `torch.broadcast_shapes` takes longer than a small product."""
    return tuple(n if m == 1 else m for m, n in zip(a.shape[:-2], b.shape[:-2], strict=True))
