"""Losses of importance and load: the fast form against the definition, and what is known at their ends."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from subquad.ops.experts.noisy_routing import add_noise, importance_load_loss, importance_load_loss_by_items


@given(
    groups=st.integers(1, 3),
    items=st.sampled_from([0, 1, 6]),
    experts=st.integers(1, 4),
    share=st.sampled_from([None, 0.0, 0.6]),
    same=st.booleans(),
    data=st.data(),
)
def test_it_equals_the_definition(
    groups: int, items: int, experts: int, share: float | None, same: bool, data: st.DataObject
) -> None:
    logits = torch.randn(groups, items, experts, dtype=torch.float64, requires_grad=True)
    noisy = logits if same else (logits + torch.randn_like(logits)).detach().requires_grad_()
    valid = None if share is None else torch.rand(groups, items) < share
    top_k, leaves = data.draw(st.integers(1, experts)), [logits] if same else [logits, noisy]
    found, expected = (
        loss(logits, noisy, top_k, valid) for loss in (importance_load_loss, importance_load_loss_by_items)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    gradients = (
        torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True) for loss in (found, expected)
    )
    for gradient, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-10)


def test_equal_use_costs_nothing_and_one_expert_for_all_the_most() -> None:
    even = torch.zeros(1, 6, 4)
    assert importance_load_loss(even, even, 1) == 0
    turns = 50 * torch.eye(4)[None].repeat(1, 3, 1)
    torch.testing.assert_close(importance_load_loss(turns, turns, 1), torch.tensor(0.0))
    crowd = torch.zeros(1, 6, 4)
    crowd[..., 2] = 50.0
    importance = 4 - 1  # (std / mean)² of (0, 0, 1, 0)
    torch.testing.assert_close(importance_load_loss(crowd, crowd, 1), torch.tensor(float(importance)))


def test_the_noise_is_as_wide_as_a_share() -> None:
    torch.manual_seed(0)
    drawn = add_noise(torch.zeros(20_000, 5))
    torch.testing.assert_close(drawn.std(), torch.tensor(0.2), rtol=0.02, atol=0)
    torch.testing.assert_close(drawn.mean(), torch.tensor(0.0), rtol=0, atol=0.003)
