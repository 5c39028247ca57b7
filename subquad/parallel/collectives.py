"""What processes tell each other inside a layer, and what the backward pass tells in return.

    operation         forward                              backward
    exchange_rows     rows to their processes              gradients of the rows, back
    enter_parts       the input, as it is                  Σ over processes of its gradients
    sum_parts         Σ over processes                     the gradient, as it is
    scale_gradient    the input, as it is                  the gradient, times a number

`enter_parts` and `sum_parts` are f and g of Shoeybi et al. 2019, arXiv:1909.08053, section 3. The differentiable
exchange is a young name of torch, which stands here alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor


def exchange_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Tell every process how many rows of each kind it will get.

    Args:
        counts: int64 (w, n), rows for process i of kind j.
        group: w processes.

    Returns:
        int64 (w, n), rows from process i of kind j.
    """
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=group)
    return received


def exchange_rows(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Send each process of the group its rows.

    Args:
        rows: (M, D), sorted by the process that they go to.
        sent: how many go to each process; M in all.
        received: how many come from each, R in all.
        group: as many processes.

    Returns:
        (R, D), sorted by the process that they come from; connected to `rows` even where both are empty, since the
        backward pass of the other processes waits for this one.
    """
    return wait_tensor(all_to_all_single_autograd(rows.contiguous(), list(received), list(sent), group))


def enter_parts(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Give x, which all processes of the group have, to the part of a layer that each computes."""
    return _EnterParts.apply(x, group)  # pyright: ignore[reportReturnType] - `apply` is untyped


def sum_parts(y: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the parts of a layer's result; all processes of the group get all of it."""
    return _SumParts.apply(y, group)  # pyright: ignore[reportReturnType] - `apply` is untyped


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """X as it is; its gradient times `factor`."""
    return _ScaleGradient.apply(x, factor)  # pyright: ignore[reportReturnType] - `apply` is untyped


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _EnterParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _summed(grad, ctx.group), None


class _SumParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(y, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * ctx.factor, None
