"""Products of the matrices of all chunks at once, (N, B, H, ·, ·) each, into memory that is there already."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write the products a b to out, all (N, B, H, ·, ·) and out contiguous; returns it."""
    torch.bmm(a.flatten(0, 2), b.flatten(0, 2), out=out.view(-1, *out.shape[-2:]))
    return out


def multiply_add(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add the products a b to out, all (N, B, H, ·, ·) and out contiguous; returns it."""
    target = out.view(-1, *out.shape[-2:])
    torch.baddbmm(target, a.flatten(0, 2), b.flatten(0, 2), out=target)
    return out
