"""Batched products whose results go straight to their places, where these are contiguous."""

from __future__ import annotations

import torch
from torch import Tensor


def in_blocks(x: Tensor, start: int, stop: int, size: int) -> Tensor:
    """(G, L, E) -> (G, stop - start, size, E), a view of some blocks of `size` tokens."""
    return x[:, start * size : stop * size].unflatten(1, (stop - start, size))


def multiply(target: Tensor, a: Tensor, b: Tensor, factor: float = 1.0, *, add: bool = False) -> None:
    """Write factor a b to the target, or add it.

    Args:
        target: (G, N, I, J), any strides.
        a: (G, N, I, K).
        b: (G, N, K, J).
        factor: what the products are multiplied by.
        add: whether they are added to what is there.
    """
    if not (target.numel() and a.shape[-1]):
        if not add:
            target.zero_()
        return
    a, b, direct = a.flatten(0, 1), b.flatten(0, 1), target.is_contiguous() and target.dtype == a.dtype
    place = target.flatten(0, 1) if direct else a.new_empty(a.shape[0], *target.shape[2:])
    torch.baddbmm(place, a, b, beta=1.0 if add and direct else 0.0, alpha=factor, out=place)
    if not direct:
        found = place.view(target.shape)
        target.add_(found) if add else target.copy_(found)
