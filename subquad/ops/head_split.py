"""Between the width of a model and its heads."""

from __future__ import annotations

from torch import Tensor


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, H * E) -> (B, H, L, E), a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, L, E) -> (B, L, H * E): the inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(2)
