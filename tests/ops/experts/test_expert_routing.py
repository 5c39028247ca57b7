"""Seats are taken in the order of the tokens; losses are those of the definition and known at their ends."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad.ops.experts.routing import (
    balance_loss,
    balance_loss_by_tokens,
    expert_rows,
    expert_rows_by_tokens,
    router_logits,
    seats,
    z_loss,
)


class Routed(NamedTuple):
    logits: Tensor
    chosen: Tensor
    valid: Tensor | None


@st.composite
def routed(draw: st.DrawFn, experts: int = 5) -> Routed:
    """Some groups of tokens, their choices, and padding in any places."""
    groups, length = draw(st.integers(1, 3)), draw(st.sampled_from([0, 1, 2, 7, 20]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    logits = torch.randn(groups, length, experts, generator=generator, dtype=torch.float64)
    chosen = logits.topk(draw(st.integers(1, experts)), dim=-1).indices
    share = draw(st.sampled_from([None, 0.0, 0.6]))
    valid = None if share is None else torch.rand(groups, length, generator=generator) < share
    return Routed(logits, chosen, valid)


@given(case=routed(), limits=st.none() | st.lists(st.integers(0, 6), min_size=3, max_size=3), ranked=st.booleans())
def test_rows_are_those_of_tokens_that_take_seats_one_after_the_other(
    case: Routed, limits: list[int] | None, ranked: bool
) -> None:
    capacity = None if limits is None else torch.tensor(limits[: case.chosen.shape[0]])
    priority = case.logits.amax(dim=-1).round() if ranked else None  # with equal ones
    found = expert_rows(case.chosen, 5, valid=case.valid, capacity=capacity, priority=priority)
    expected = expert_rows_by_tokens(case.chosen, 5, valid=case.valid, capacity=capacity, priority=priority)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.choices, expected.choices)
    assert found[2:] == expected[2:]


def test_the_first_tokens_have_the_seats() -> None:
    chosen = torch.tensor([[[1], [0], [1], [1], [1]], [[1], [1], [1], [0], [0]]])
    rows = expert_rows(chosen, 2, capacity=torch.tensor([2, 1]))
    assert rows.tokens.tolist() == [1, 8, 0, 2, 5]
    assert rows.counts == (2, 3)
    assert rows.dropped == 5


def test_tokens_of_priority_have_the_seats() -> None:
    chosen = torch.tensor([[[1], [0], [1], [1], [1]], [[1], [1], [1], [0], [0]]])
    priority = torch.tensor([[0.1, 0.2, 0.3, 0.9, 0.3], [0.5, 0.5, 0.6, 0.1, 0.2]])
    rows = expert_rows(chosen, 2, capacity=torch.tensor([2, 1]), priority=priority)
    assert rows.tokens.tolist() == [1, 9, 3, 2, 7]
    assert rows.dropped == 5


def test_no_later_token_takes_the_seat_of_an_earlier_one() -> None:
    chosen = torch.randn(1, 30, 5).topk(2, dim=-1).indices
    whole, part = (expert_rows(chosen[:, :length], 5, capacity=torch.tensor([4])) for length in (30, 11))
    kept = {(int(t), int(c)) for t, c in zip(whole.tokens, whole.choices, strict=True) if t < 11}
    assert kept == {(int(t), int(c)) for t, c in zip(part.tokens, part.choices, strict=True)}


@pytest.mark.parametrize(
    ("tokens", "top_k", "factor", "expected"),
    [(64, 1, 1.0, 16), (64, 1, 1.25, 20), (10, 1, 1.0, 4), (65, 1, 1.25, 20), (64, 2, 1.0, 32), (0, 1, 1.0, 4)],
)
def test_seats_are_a_share_of_the_choices(tokens: int, top_k: int, factor: float, expected: int) -> None:
    assert seats(torch.tensor([tokens]), experts=4, top_k=top_k, factor=factor, least=4).tolist() == [expected]


@given(case=routed())
def test_the_balance_loss_is_that_of_the_definition(case: Routed) -> None:
    logits = case.logits.requires_grad_()
    losses = [
        function(logits.softmax(dim=-1), case.chosen, case.valid) for function in (balance_loss, balance_loss_by_tokens)
    ]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@given(case=routed())
def test_the_z_loss_is_the_mean_square_of_the_normalisers(case: Routed) -> None:
    kept = case.logits if case.valid is None else case.logits[case.valid]
    squares = kept.exp().sum(dim=-1).log().square()
    expected = squares.mean() if squares.numel() else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(z_loss(case.logits, case.valid), expected)


@pytest.mark.parametrize("top_k", [1, 2])
def test_equal_routing_costs_exactly_one(top_k: int) -> None:
    token = torch.arange(16)
    chosen = torch.stack([(token + choice) % 8 for choice in range(top_k)], dim=-1)[None]
    assert float(balance_loss(torch.full((1, 16, 8), 1 / 8), chosen)) == 1.0


def test_everything_to_one_expert_costs_as_much_as_there_are_experts() -> None:
    chosen = torch.full((2, 12, 1), 3)
    probabilities = torch.zeros(2, 12, 8)
    probabilities[..., 3] = 1
    assert float(balance_loss(probabilities, chosen)) == 8.0


def test_routing_is_in_float32_or_wider_under_autocast_and_for_narrow_tokens() -> None:
    x, weight = torch.randn(4, 6, dtype=torch.bfloat16), torch.randn(3, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router_logits(x, weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ weight.float().T)
    assert router_logits(x.double(), weight).dtype == torch.float64
