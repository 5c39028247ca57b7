"""Logits of a router that reads its tokens with noise.

    l = W (x ⊙ (1 + ε u))        u uniform in (-1, 1), for every channel of every token

u takes 65,536 values, all as likely and symmetric about 0: torch's generator draws four of them at once. Autograd keeps
x, W and u in two bytes; x with its noise is made for some tokens at a time, and again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.experts.routing import router_logits
from subquad.ops.precision import full_precision, wide_dtype

SLICE = 2**18
"""Numbers of x that get their noise at a time: they stay in the cache."""
LEVELS = 2**15
"""Values of u on either side of 0."""


def draw_levels(x: Tensor) -> Tensor:
    """From torch's generator, int16 of the shape of x: u is (level + 1/2) / `LEVELS`."""
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    return drawn.random_(-(2**63), None).view(torch.int16)[: x.numel()].view(x.shape)


def jittered(x: Tensor, levels: Tensor, jitter: float) -> Tensor:
    """X ⊙ (1 + ε u), in float32 or wider, of x and its levels, both (..., D)."""
    return _factors(x, levels, jitter).mul_(x)


def jittered_logits_at_once(x: Tensor, weight: Tensor, levels: Tensor, jitter: float) -> Tensor:
    """The definition. Arguments and result as in `jittered_logits`."""
    return router_logits(jittered(x, levels, jitter), weight)


def jittered_logits(x: Tensor, weight: Tensor, levels: Tensor, jitter: float) -> Tensor:
    """The router's logits, in float32 or wider whatever autocast says.

    Args:
        x: (..., D).
        weight: W, (X, D).
        levels: int16 (..., D), of `draw_levels`.
        jitter: ε.

    Returns:
        (..., X).
    """
    with full_precision(x.device):
        logits = _JitteredLogits.apply(x.flatten(0, -2), weight, levels.flatten(0, -2), jitter)
    return logits.view(*x.shape[:-1], len(weight))  # pyright: ignore[reportAttributeAccessIssue] - `apply` is untyped


class _JitteredLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, levels: Tensor, jitter: float) -> Tensor:
        ctx.save_for_backward(x, weight, levels)
        ctx.jitter = jitter
        logits = x.new_empty(len(x), len(weight), dtype=wide_dtype(x))
        wide = weight.to(logits.dtype).T
        for tokens in _slices(x):
            torch.mm(jittered(x[tokens], levels[tokens], jitter), wide, out=logits[tokens])
        return logits

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, levels = ctx.saved_tensors
        wide = weight.to(grad.dtype)
        of_x, of_weight = torch.empty_like(x), torch.zeros_like(wide)
        for tokens in _slices(x):
            factors = _factors(x[tokens], levels[tokens], ctx.jitter)
            torch.mul(grad[tokens] @ wide, factors, out=of_x[tokens])
            of_weight.addmm_(grad[tokens].T, factors.mul_(x[tokens]))
        return of_x, of_weight.to(weight.dtype), None, None


def _factors(x: Tensor, levels: Tensor, jitter: float) -> Tensor:
    """1 + ε u."""
    return levels.to(wide_dtype(x)).add_(0.5).mul_(jitter / LEVELS).add_(1)


def _slices(x: Tensor) -> Iterator[slice]:
    size = max(1, SLICE // max(1, x.shape[1]))
    return (slice(start, start + size) for start in range(0, len(x), size))
