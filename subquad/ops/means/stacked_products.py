"""Products of stacks of matrices: one after the other where each is large enough for oneDNN, together where not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from subquad.ops.onednn import SMALLEST_PRODUCT, add_product_, product


def stacked_product(a: Tensor, b: Tensor) -> Tensor:
    """The products a b.

    Args:
        a: (B, G, M, K); B and G may be 1 instead.
        b: (B, G, K, N).

    Returns:
        (B, G, M, N).
    """
    if not _large(a, b):
        return a @ b
    found = [product(one, other.mT) for one, other in _pairs(a, b)]
    stacks = _stacks(a, b)
    return (found[0] if len(found) == 1 else torch.stack(found)).view(*stacks, a.shape[2], b.shape[3])


def add_stacked_product_(target: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the products a b to the target (B, G, M, N); a and b as in `stacked_product`."""
    if not _large(a, b):
        target += a @ b
        return
    for sums, (one, other) in zip((sums for stack in target for sums in stack), _pairs(a, b), strict=True):
        add_product_(sums, one, other.mT)


def _large(a: Tensor, b: Tensor) -> bool:
    return a.shape[2] * a.shape[3] * b.shape[3] >= SMALLEST_PRODUCT


def _pairs(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The matrices that belong together, stack by stack."""
    stacks = _stacks(a, b)
    a, b = (x.expand(*stacks, -1, -1) for x in (a, b))
    return ((a[i, j], b[i, j]) for i in range(stacks[0]) for j in range(stacks[1]))


def _stacks(a: Tensor, b: Tensor) -> tuple[int, int]:
    """B and G; `torch.broadcast_shapes` takes longer than a small product."""
    batch, groups = (n if m == 1 else m for m, n in zip(a.shape[:2], b.shape[:2], strict=True))
    return batch, groups
