"""Patterns that are compiled into strips and tiles, tensors for them, and the definition beside the engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.ops import pattern_attention_with_lse
from subquad.patterns import (
    Block,
    BlockWindow,
    Causal,
    Columns,
    Dilated,
    Global,
    Pattern,
    Random,
    Sink,
    Strided,
    Window,
)

LONG = {
    "window": Window(128, 128),
    "causal window": Causal() & Window(127, 0),
    "dilated": Dilated(32, 32, 4),
    "strided": Causal() & (Window(127, 0) | Strided(128)),
    "fixed": Causal() & (Block(128) | Columns(128, 8)),
    "longformer": Window(64, 64) | Global([0, 700]),
    "bigbird": Global([*range(64)]) | BlockWindow(64, 1, 1) | Random(64, 3, seed=1),
    "sinks": Causal() & (Sink(4) | Window(127, 0)),
}


def heads(length: int, *, batch: int = 1, dtype: torch.dtype = torch.float64, width: int = 4) -> Tensor:
    return torch.randn(batch, 2, length, width, dtype=dtype, requires_grad=True)


def triple(length: int, **shape: Any) -> tuple[Tensor, Tensor, Tensor]:
    return heads(length, **shape), heads(length, **shape), heads(length, **shape)


def assert_backends_agree(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **facts: Any) -> None:
    """Values, log-sum-exps, and the gradients of a random combination of both."""
    expected = pattern_attention_with_lse(q, k, v, pattern, backend="dense", **facts)
    found = pattern_attention_with_lse(q, k, v, pattern, backend="blocked", **facts)
    seen = expected[1].isfinite()
    weights, lse_weights = torch.randn_like(expected[0]), torch.randn_like(expected[1])

    def gradients(result: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        total = (result[0] * weights).sum() + (result[1].masked_fill(~seen, 0.0) * lse_weights).sum()
        return torch.autograd.grad(total, (q, k, v), materialize_grads=True, allow_unused=True)

    for one, other in zip((*found, *gradients(found)), (*expected, *gradients(expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
