"""The mixture of experts: a few experts for each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from experts_by_loop import assert_equals_the_loop, expert_output
from hypothesis import given
from hypothesis import strategies as st
from prices import assert_price_is_counted
from torch import Tensor

from subquad import Mask, receipts
from subquad.build import build_feedforward, feedforward_config
from subquad.feedforward.moe import Moe


def moe(**options: Any) -> Moe:
    """Width 6, four experts, random biases."""
    small = {"experts": 4, "hidden_dim": 5, "min_capacity": 1}
    module = build_feedforward("moe", embed_dim=6, **(small | options))
    assert isinstance(module, Moe)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return module


@given(
    length=st.sampled_from([1, 2, 7, 20]),
    factor=st.sampled_from([None, 0.5, 1.25]),
    group=st.sampled_from(["batch", "sequence"]),
    padded=st.booleans(),
    top_k=st.integers(2, 4),
    renormalise=st.booleans(),
)
def test_it_equals_the_loop_over_tokens(
    length: int, factor: float | None, group: str, padded: bool, top_k: int, renormalise: bool
) -> None:
    def likeliest(probabilities: Tensor) -> dict[int, Tensor]:
        chosen = probabilities.argsort(descending=True).tolist()[:top_k]
        total = sum(probabilities[expert] for expert in chosen) if renormalise else 1.0
        return {expert: probabilities[expert] / total for expert in chosen}

    mask = Mask.from_lengths([length, length // 2], length) if padded else None
    module = moe(capacity_factor=factor, group=group, top_k=top_k, renormalise=renormalise, z_weight=0.0)
    assert_equals_the_loop(module, length, mask, likeliest)


def test_gates_are_the_softmax_over_the_kept_logits() -> None:
    module, x = moe(), torch.randn(1, 9, 6)
    logits, chosen = (x @ module.router.T).topk(2, dim=-1)
    found, gates = module.choose((x @ module.router.T).softmax(dim=-1))
    assert torch.equal(found, chosen)
    torch.testing.assert_close(gates, logits.softmax(dim=-1))


def test_equal_experts_give_their_result() -> None:
    module, x = moe(), torch.randn(2, 9, 6)
    with torch.no_grad():
        for stacked in module.experts.parameters():
            stacked.copy_(stacked[:1].expand_as(stacked).clone())
    torch.testing.assert_close(module(x).y, expert_output(module, x, 0))


def test_losses_add_up() -> None:
    x = torch.randn(2, 9, 6)
    module = moe(balance_weight=0.5, z_weight=0.25)
    alone = [moe(balance_weight=0.5, z_weight=0.0), moe(balance_weight=0.0, z_weight=0.25)]
    for other in alone:
        other.load_state_dict(module.state_dict())
    balance, size = (other(x).aux_loss for other in alone)
    logits = x @ module.router.T
    torch.testing.assert_close(size, 0.25 * logits.exp().sum(dim=-1).log().square().mean())
    torch.testing.assert_close(module(x).aux_loss, balance + size)
    assert module.eval()(x).aux_loss is None
    assert moe(balance_weight=0.0, z_weight=0.0)(x).aux_loss is None


def test_padding_counts_in_no_loss() -> None:
    module, x = moe(), torch.randn(2, 9, 6)
    hidden = torch.cat((x, torch.full((2, 4, 6), torch.nan)), dim=1)
    y, _, aux_loss = module(hidden, mask=Mask.from_lengths([9, 9], 13))
    expected = module(x)
    torch.testing.assert_close(y[:, :9], expected.y)
    torch.testing.assert_close(aux_loss, expected.aux_loss)
    assert (y[:, 9:] == 0).all()


def test_choices_without_a_seat_are_counted() -> None:
    module, x = moe(capacity_factor=1.0, top_k=2), torch.rand(1, 8, 6) + 0.1
    with torch.no_grad():
        module.router.copy_(torch.tensor([[3.0], [2.0], [1.0], [0.0]]).expand(4, 6))
    with receipts() as left:
        y = module(x).y
    assert (y != 0).any(dim=-1).tolist() == [[True] * 4 + [False] * 4]
    assert [(entry.where, entry.count) for entry in left.entries] == [("moe", 8)]


def test_without_capacity_examples_do_not_know_of_each_other() -> None:
    module, x = moe(), torch.randn(4, 9, 6)
    torch.testing.assert_close(module(x).y, torch.cat([module(example[None]).y for example in x]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"renormalise": False}, {"z_weight": 0.0}, {"z_weight": 0.0, "balance_weight": 0.0}]
)
def test_the_price_is_what_the_counters_count(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_price_is_counted("moe", options, dtype=dtype)


def test_tokens_meet_in_capacity_and_losses() -> None:
    assert not feedforward_config("moe", balance_weight=0.0).position_wise
    assert not feedforward_config("moe", z_weight=0.0).position_wise
    assert feedforward_config("moe", balance_weight=0.0, z_weight=0.0).position_wise


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "moe: top_k must be at least 1 and at most experts=4, got 0"),
        ({"top_k": 5}, "moe: top_k must be at least 1 and at most experts=4, got 5"),
        ({"top_k": 1}, "moe: with top_k=1 a renormalised gate is always 1"),
        ({"z_weight": -1}, "moe: z_weight must be at least 0, got -1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe(**options)
