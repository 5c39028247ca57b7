"""The product of a linear layer, by oneDNN where that is faster and the product large enough."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.onednn import outruns_mm, product, product_over_rows, suits
from subquad.ops.precision import autocast_dtype

SMALLEST_PROJECTION = 2**25
"""Multiplications below which a node of autograd of our own costs more than it gains."""


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `torch.nn.functional.linear` gives, x Wᵀ + b; autograd keeps the same, and can differentiate it twice.

    Args:
        x: (..., K).
        weight: W, (N, K).
        bias: b, (N,).

    Returns:
        (..., N).
    """
    if _by_onednn(x, weight):
        return _Projection.apply(x, weight, bias)  # pyright: ignore[reportReturnType] - apply has no types
    return F.linear(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Large, and of plain float32 tensors that autocast doesn't narrow."""
    large = x.numel() * weight.shape[0] >= SMALLEST_PROJECTION
    return large and outruns_mm() and suits(x, weight) and autocast_dtype(x) == x.dtype


class _Projection(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            project(grad, weight.mT) if wants_x else None,
            product_over_rows(rows, x.flatten(0, -2), by=project) if wants_weight else None,
            rows.sum(dim=0) if wants_bias else None,
        )
