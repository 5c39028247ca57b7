"""What is made again in the backward pass has the gradients of what is kept, and keeps the arguments alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from subquad.ops.recomputed import recomputed


def curve(x: Tensor, y: Tensor) -> Tensor:
    return (x.exp() * y).sin() / (1 + y.square())


def test_values_and_gradients_are_those_of_the_function() -> None:
    x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.randn(3, 4, dtype=torch.float64)
    out, expected = recomputed(curve, x, y), curve(x, y)
    assert torch.equal(out, expected)
    pairs = (torch.autograd.grad((result * weights).sum(), (x, y)) for result in (out, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_constant_argument_gets_no_gradient() -> None:
    x, y = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    recomputed(curve, x, y).sum().backward()
    assert x.grad is not None
    assert y.grad is None


def test_a_missing_argument_is_handed_on() -> None:
    def scaled(x: Tensor, factor: Tensor | None, y: Tensor) -> Tensor:
        return curve(x if factor is None else x * factor, y)

    x, y = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    out, expected = recomputed(scaled, x, None, y), curve(x, y)
    assert torch.equal(out, expected)
    for one, other in zip(*(torch.autograd.grad(result.sum(), (x, y)) for result in (out, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_the_arguments_alone_are_kept() -> None:
    x, y = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        recomputed(curve, x, y)
    assert len(kept) == 2


def test_autocast_narrows_nothing() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = recomputed(torch.matmul, x, weight)
    assert torch.equal(out, x @ weight)
