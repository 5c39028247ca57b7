"""Experts on contiguous rows equal the loop over rows, in values and all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad.benchmark.memory import saved_bytes
from subquad.ops.experts.grouped import ACTIVATIONS, ExpertWeights, experts, experts_by_rows
from subquad.ops.experts.routing import ExpertRows, expert_rows

EXPERTS, WIDTH, HIDDEN = 4, 3, 5


def drawn_weights(width: int = WIDTH, hidden: int = HIDDEN, dtype: torch.dtype = torch.float64) -> ExpertWeights:
    shapes = ((EXPERTS, hidden, width), (EXPERTS, hidden), (EXPERTS, width, hidden), (EXPERTS, width))
    return ExpertWeights(*(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes))


def drawn_rows(tokens: int, top_k: int, capacity: int | None = None) -> ExpertRows:
    chosen = torch.randn(1, tokens, EXPERTS).topk(top_k, dim=-1).indices
    return expert_rows(chosen, EXPERTS, capacity=None if capacity is None else torch.tensor([capacity]))


def gradients(y: Tensor, leaves: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y * upstream).sum(), leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(
    tokens=st.sampled_from([0, 1, 2, 9, 30]),
    top_k=st.integers(1, EXPERTS),
    capacity=st.none() | st.integers(1, 5),
)
def test_values_and_gradients_are_those_of_the_loop(
    activation: str, tokens: int, top_k: int, capacity: int | None
) -> None:
    rows, weights = drawn_rows(tokens, top_k, capacity), drawn_weights()
    x = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    y, expected = (each(x, gates, weights, rows, ACTIVATIONS[activation]) for each in (experts, experts_by_rows))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    upstream, leaves = torch.randn_like(y), [x, gates, *weights]
    if not y.numel():
        return
    found, wanted = (gradients(each, leaves, upstream) for each in (y, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_products_large_enough_for_onednn_give_the_same() -> None:
    rows, weights = drawn_rows(600, 2), drawn_weights(64, 128, torch.float32)
    x, gates = torch.randn(600, 64, requires_grad=True), torch.rand(600, 2, requires_grad=True)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, gates, *weights)]
    y = experts(x, gates, weights, rows, ACTIVATIONS["gelu"])
    expected = experts_by_rows(wide[0], wide[1], ExpertWeights(*wide[2:]), rows, ACTIVATIONS["gelu"])
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-3)
    upstream = torch.randn_like(y)
    found, wanted = gradients(y, [x, gates, *weights], upstream), gradients(expected, wide, upstream.double())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-2)


def test_dropout_drops_hidden_channels_in_both_passes() -> None:
    rows, (x, gates) = drawn_rows(8, 1), (torch.randn(8, WIDTH).double().requires_grad_(), torch.rand(8, 1).double())
    weights = drawn_weights()

    def run(*leaves: Tensor) -> Tensor:
        torch.manual_seed(0)
        return experts(leaves[0], gates, ExpertWeights(*leaves[1:]), rows, ACTIVATIONS["gelu"], 0.3)

    assert torch.autograd.gradcheck(run, (x, *weights))
    ones = ExpertWeights(
        torch.zeros(EXPERTS, 400, WIDTH),
        torch.ones(EXPERTS, 400),
        torch.ones(EXPERTS, WIDTH, 400) / 400,
        torch.zeros(EXPERTS, WIDTH),
    )
    y = experts(torch.zeros(8, WIDTH), torch.ones(8, 1), ones, rows, ACTIVATIONS["relu"], 0.25)
    kept = y * 0.75
    assert 0.65 < float(kept.min()) <= float(kept.max()) < 0.85


def test_dropout_is_the_same_in_bfloat16() -> None:
    rows, weights = drawn_rows(8, 1), drawn_weights(dtype=torch.bfloat16)
    x, gates = torch.randn(8, WIDTH, dtype=torch.bfloat16, requires_grad=True), torch.rand(8, 1)
    y = experts(x, gates, weights, rows, ACTIVATIONS["gelu"], 0.3)
    (y * torch.randn_like(y)).sum().backward()
    assert y.dtype == torch.bfloat16
    for leaf in (x, *weights):
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())


def test_autocast_narrows_the_products() -> None:
    rows, weights = drawn_rows(9, 2), drawn_weights(dtype=torch.float32)
    x, gates = torch.randn(9, WIDTH, requires_grad=True), torch.rand(9, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = experts(x, gates, weights, rows, ACTIVATIONS["gelu"])
    y.sum().backward()
    expected = experts(x, gates, weights, rows, ACTIVATIONS["gelu"])
    assert y.dtype == torch.float32
    assert not torch.equal(y, expected)
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.2)
    assert weights.expand.grad is not None
    assert weights.expand.grad.dtype == torch.float32


def test_tokens_and_hidden_rows_before_the_activation_are_kept_and_no_rows_of_tokens() -> None:
    rows, weights = drawn_rows(200, 1), drawn_weights(16, 32, torch.float32)
    x, gates = torch.randn(200, 16, requires_grad=True), torch.rand(200, 1, requires_grad=True)
    kept = saved_bytes(lambda: experts(x, gates, weights, rows, ACTIVATIONS["gelu"]), weights)
    indices = 2 * 8 * 200
    assert kept == 4 * 200 * (16 + 32 + 1) + indices
