"""The fused operator reads its arguments by their strides; products of matrices compute the same elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from another_device import another_device, here, there
from torch import Tensor

from subquad.ops.fused import fused_backward, fused_forward

SCALE = 0.3


def tokens_inside(x: Tensor) -> Tensor:
    """The same numbers with tokens, not channels, as neighbours in memory."""
    return x.mT.contiguous().mT


def every_other(x: Tensor) -> Tensor:
    """The same numbers with others between them."""
    return torch.stack((x, torch.full_like(x, 7.0)), dim=-1)[..., 0]


@pytest.mark.parametrize("lay_out", [tokens_inside, every_other])
@pytest.mark.parametrize("width", [2, 5])
def test_strides_change_nothing(lay_out: Callable[[Tensor], Tensor], width: int) -> None:
    q, k, v, grad = (torch.randn(2, 3, 7, width, dtype=torch.float64) for _ in range(4))
    out, lse = fused_forward(q, k, v, SCALE)
    found = fused_forward(lay_out(q), lay_out(k), lay_out(v), SCALE)
    torch.testing.assert_close(found, (out, lse), rtol=0, atol=0)
    gradients = fused_backward(grad, q, k, v, out, lse, SCALE)
    found = fused_backward(lay_out(grad), lay_out(q), lay_out(k), lay_out(v), lay_out(out), lse, SCALE)
    torch.testing.assert_close(found, gradients, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["whole", "causal", "masked"])
def test_products_on_other_devices_compute_the_same(form: str) -> None:
    q, k, v, grad = (torch.randn(2, 3, 7, 4, dtype=torch.float64) for _ in range(4))
    hidden = torch.rand(7, 7) < 0.4
    hidden[2], hidden[0, 0] = True, False
    bias = torch.zeros(7, 7, dtype=torch.float64).masked_fill(hidden, -torch.inf) if form == "masked" else None

    def step(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        out, lse = fused_forward(q, k, v, SCALE, bias, causal=form == "causal")
        return out, lse, *fused_backward(grad, q, k, v, out, lse, SCALE, bias, causal=form == "causal")

    with another_device():
        found = step(*(there(x) for x in (q, k, v, grad, bias)))
    for got, expected in zip(here(found), step(q, k, v, grad, bias), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
