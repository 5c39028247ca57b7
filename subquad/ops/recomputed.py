"""Elementwise work whose intermediate results autograd doesn't keep: made again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from subquad.ops.precision import full_precision


def recomputed(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """`function(*tensors)`, never narrowed by autocast, of which autograd keeps the arguments alone.

    Args:
        function: deterministic, and of no other tensors that need a gradient.
        *tensors: its arguments, floating point, the first a tensor; None is handed on.
    """
    return _Recomputed.apply(function, *tensors)  # pyright: ignore[reportReturnType] - `apply` is untyped


class _Recomputed(Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        assert tensors[0] is not None
        with full_precision(tensors[0].device):
            return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        tensors = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad(), full_precision(grad.device):
            out = ctx.function(*tensors)
        learned = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        grads = iter(torch.autograd.grad(out, learned, grad))
        return None, *(next(grads) if need else None for need in needed)
