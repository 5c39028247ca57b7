"""Products of matrices by oneDNN, which on many CPUs is two to three times faster in float32 than the BLAS behind `mm`.

The operator is private to torch; this module alone names it. Where it is missing, and for what it doesn't take, `mm`
computes the same.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

SMALLEST_PRODUCT = 2**21
"""Multiplications below which `mm` is faster: a call costs about 20 µs."""


@cache
def has_onednn() -> bool:
    """Whether this build of torch offers the operator for dense float32 matrices."""
    try:
        one = torch.ones(1, 1)
        return bool(torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "") == 1)
    except (AttributeError, RuntimeError):
        return False


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product a bᵀ + bias.

    Args:
        a: (M, K); copied where it isn't contiguous.
        b: (N, K), any strides.
        bias: (N,).

    Returns:
        (M, N), contiguous.
    """
    if _suits(a, b):
        return torch.ops.mkldnn._linear_pointwise(a.contiguous(), _whole(b), bias, "none", [], "")
    return a @ b.T if bias is None else torch.addmm(bias, a, b.T)


def _suits(a: Tensor, b: Tensor) -> bool:
    large = a.shape[0] * a.shape[1] * b.shape[0] >= SMALLEST_PRODUCT
    return large and a.dtype == torch.float32 and a.device.type == "cpu" and has_onednn()


def _whole(b: Tensor) -> Tensor:
    """A copy of a matrix cut from wider rows or columns, for which the operator has only slow reference code."""
    return b if b.is_contiguous() or b.mT.is_contiguous() else b.contiguous()
