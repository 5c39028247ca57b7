"""The matrix product of oneDNN, which on some processors runs two to three times as fast as torch's own in float32.

The operator behind it is private to torch; this module alone names it, and falls back to `torch.mm` without it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

SMALLEST = 2**21
"""Multiply-adds from which the operator, slow to call, is worth it."""


@cache
def available() -> bool:
    """Whether this build of torch has the operator, and with the signature that is used here."""
    try:
        probe = torch.ones(2, 2)
        return torch.equal(_linear(probe, probe), 2 * probe)
    except (AttributeError, RuntimeError):
        return False


def matmul(a: Tensor, b_transposed: Tensor) -> Tensor:
    """The product of a matrix and a transposed one.

    Args:
        a: (M, K).
        b_transposed: (N, K), the same dtype.

    Returns:
        (M, N). oneDNN computes it for large float32 matrices on the CPU, torch.mm all others.
    """
    large = a.shape[0] * b_transposed.shape[0] * a.shape[1] >= SMALLEST
    if large and a.dtype == torch.float32 and a.device.type == "cpu" and available():
        return _linear(a.contiguous(), b_transposed.contiguous())  # rows of wider ones take a path 1000 times slower
    return torch.mm(a, b_transposed.mT)


def _linear(a: Tensor, b_transposed: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b_transposed, None, "none", [], "")
