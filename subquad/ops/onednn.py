"""Products of matrices by oneDNN, which on AMD's newer CPUs is about twice as fast in float32 as the BLAS behind `mm`.

The operator is private to torch; this module alone names it. Where it is missing or no faster, and for what it doesn't
take, `mm` computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from subquad.processor import made_by_intel

SMALLEST_PRODUCT = 2**21
"""Multiplications below which `mm` is faster: a call costs about 20 µs."""

SUMMED = 2**18
"""Numbers of a product that is made and added at a time."""

PLAIN = (Tensor, torch.nn.Parameter)


def has_onednn() -> bool:
    """Whether this build of torch offers the operator for dense float32 matrices.

    Never while a compiler traces: it chooses its products itself, and can't trace the question.
    """
    return not torch.compiler.is_compiling() and _offered()


def outruns_mm() -> bool:
    """Whether large products run faster than by `mm`, by the vectors that this processor has.

    The operator uses those of 512 bits wherever there are any, the BLAS behind `mm` only those of 256, but on
    processors of its maker. Where both use the same, they run at the same speed, and `mm` needs no copies.
    """
    return has_onednn() and "AVX512" in torch.backends.cpu.get_cpu_capability() and not made_by_intel()


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product a bᵀ + bias.

    Args:
        a: (M, K); copied where it isn't contiguous.
        b: (N, K), any strides.
        bias: (N,); the operator adds it in the same pass, `mm` in one more.

    Returns:
        (M, N), contiguous.
    """
    if _large(a, b) and (bias is not None or outruns_mm()):
        return torch.ops.mkldnn._linear_pointwise(a.contiguous(), _whole(b), bias, "none", [], "")
    return a @ b.T if bias is None else torch.addmm(bias, a, b.T)


def logistic_product(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """1 / (1 + exp(-(a bᵀ + bias))); arguments and result as in `product`. The function costs next to nothing."""
    if _large(a, b):
        return torch.ops.mkldnn._linear_pointwise(a.contiguous(), _whole(b), bias, "sigmoid", [], "")
    return torch.addmm(bias, a, b.T).sigmoid_()


def product_over_rows(a: Tensor, b: Tensor, *, by: Callable[[Tensor, Tensor], Tensor] = product) -> Tensor:
    """The product aᵀ b.

    Args:
        a: (K, M).
        b: (K, N). The operator wants one of both transposed in memory: the narrower one is copied.
        by: what makes a product as `product` does.

    Returns:
        (M, N), any strides.
    """
    return by(a.mT, b.mT) if a.shape[1] < b.shape[1] else by(b.mT, a.mT).mT


def add_product_(target: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a bᵀ to the target (M, N), some rows at a time, so that their product is still in the cache.

    Args:
        target: (M, N), any strides.
        a: (M, K). Where it isn't contiguous, the narrower one of both is copied.
        b: (N, K).
    """
    if not (suits(a, b) and outruns_mm()):
        target.addmm_(a, b.mT)
        return
    if a.shape[0] > b.shape[0] and not a.is_contiguous():
        target, a, b = target.mT, b, a
    b, size = _whole(b), max(1, SUMMED // max(1, b.shape[0]))
    for start in range(0, len(target), size):
        rows = slice(start, start + size)
        target[rows].add_(product(a[rows], b))


def suits(a: Tensor, b: Tensor) -> bool:
    """Whether the operator takes these: float32 on a CPU, and no subclass such as a distributed or a fake tensor."""
    plain = type(a) in PLAIN and type(b) in PLAIN
    return plain and a.dtype == b.dtype == torch.float32 and a.device.type == "cpu" and has_onednn()


def _large(a: Tensor, b: Tensor) -> bool:
    return a.shape[0] * a.shape[1] * b.shape[0] >= SMALLEST_PRODUCT and suits(a, b)


def _whole(b: Tensor) -> Tensor:
    """A copy of a matrix cut from wider rows or columns, for which the operator has only slow reference code."""
    return b if b.is_contiguous() or b.mT.is_contiguous() else b.contiguous()


@cache
def _offered() -> bool:
    try:
        one = torch.ones(1, 1)
        return bool(torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "") == 1)
    except (AttributeError, RuntimeError):
        return False
