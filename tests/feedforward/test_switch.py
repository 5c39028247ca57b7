"""The Switch layer: one expert for each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from experts_by_loop import assert_equals_the_loop, expert_output
from hypothesis import given
from hypothesis import strategies as st
from prices import assert_price_is_counted, saved_numbers
from torch import Tensor, nn
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
    load_balancing_loss_func,
)

from subquad import Mask, receipts
from subquad.build import build_feedforward, feedforward_config
from subquad.feedforward.mlp import Mlp
from subquad.feedforward.switch import Switch


def switch(**options: Any) -> Switch:
    """Width 6, three experts, random biases, no jitter unless asked for."""
    small = {"experts": 3, "hidden_dim": 5, "min_capacity": 1, "jitter": 0.0}
    module = build_feedforward("switch", embed_dim=6, **(small | options))
    assert isinstance(module, Switch)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return module


def likeliest(probabilities: Tensor) -> dict[int, Tensor]:
    expert = int(probabilities.argmax())
    return {expert: probabilities[expert]}


def probabilities_of(module: Switch, x: Tensor) -> Tensor:
    return (x @ module.router.T).softmax(dim=-1)


@given(
    length=st.sampled_from([1, 2, 7, 20]),
    factor=st.sampled_from([None, 0.5, 1.25]),
    group=st.sampled_from(["batch", "sequence"]),
    padded=st.booleans(),
)
def test_it_equals_the_loop_over_tokens(length: int, factor: float | None, group: str, padded: bool) -> None:
    mask = Mask.from_lengths([length, length // 2], length) if padded else None
    assert_equals_the_loop(switch(capacity_factor=factor, group=group), length, mask, likeliest)


def test_one_expert_is_an_mlp() -> None:
    module, mlp = switch(experts=1, capacity_factor=None), build_feedforward("mlp", embed_dim=6, hidden_dim=5)
    assert isinstance(mlp, Mlp)
    with torch.no_grad():
        for layer, weight, bias in (
            (mlp.expand, module.experts.expand, module.experts.expand_bias),
            (mlp.contract, module.experts.contract, module.experts.contract_bias),
        ):
            layer.weight.copy_(weight[0])
            layer.bias.copy_(bias[0])
    x = torch.randn(2, 9, 6)
    torch.testing.assert_close(module(x).y, mlp(x).y)


def test_equal_experts_give_their_result_times_the_largest_probability() -> None:
    module, x = switch(capacity_factor=None), torch.randn(2, 9, 6)
    with torch.no_grad():
        for stacked in module.experts.parameters():
            stacked.copy_(stacked[:1].expand_as(stacked).clone())
    expected = expert_output(module, x, 0) * probabilities_of(module, x).amax(dim=-1, keepdim=True)
    torch.testing.assert_close(module(x).y, expected)


def test_it_is_hugging_faces_layer_in_evaluation_where_each_sequence_is_a_group() -> None:
    sizes = SwitchTransformersConfig(d_model=6, d_ff=5, num_experts=3, expert_capacity=4, dense_act_fn="relu")
    theirs = SwitchTransformersSparseMLP(sizes).eval()
    ours = switch(activation="relu", group="sequence", capacity_factor=1.0).eval()
    with torch.no_grad():
        ours.router.copy_(nn.init.normal_(theirs.router.classifier.weight))
        ours.experts.expand_bias.zero_()
        ours.experts.contract_bias.zero_()
        for index in range(3):
            expert = theirs.experts[f"expert_{index}"]
            assert isinstance(expert, nn.Module)
            expert.get_parameter("wi.weight").copy_(ours.experts.expand[index])
            expert.get_parameter("wo.weight").copy_(ours.experts.contract[index])
    x = torch.randn(2, 12, 6)
    with receipts() as left:
        torch.testing.assert_close(ours(x).y, theirs(x))
    assert left.entries  # some were dropped


def test_the_auxiliary_loss_is_hugging_faces_for_one_layer() -> None:
    module, x = switch(group="sequence"), torch.randn(2, 9, 6)
    probabilities = probabilities_of(module, x)
    expected = 0.01 * load_balancing_loss_func(probabilities, probabilities.argmax(dim=-1))
    torch.testing.assert_close(module(x).aux_loss, torch.as_tensor(expected))


def test_equal_routing_costs_its_weight_in_training_alone() -> None:
    module, x = switch(experts=4, balance_weight=0.25), torch.zeros(1, 8, 6)
    x[0, torch.arange(8), torch.arange(8) % 4] = 1e-7  # decides, and hardly changes probabilities
    with torch.no_grad():
        module.router.copy_(torch.eye(6)[:4])
    loss = module(x).aux_loss
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert float(loss.detach()) == pytest.approx(0.25, rel=1e-6)
    assert module.eval()(x).aux_loss is None
    assert switch(balance_weight=0.0)(x).aux_loss is None


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"capacity_factor": 1.0}, [6, 0]),
        ({"capacity_factor": 1.25}, [7, 0]),
        ({"capacity_factor": 1.0, "group": "sequence"}, [3, 3]),
        ({"capacity_factor": 1.0, "min_capacity": 8}, [8, 0]),
        ({"capacity_factor": 2.0}, [9, 3]),
        ({"capacity_factor": None}, [9, 9]),
    ],
)
def test_the_first_tokens_have_the_seats_and_dropped_ones_are_counted(options: dict[str, Any], kept: list[int]) -> None:
    module, x = switch(**options), torch.rand(2, 9, 6) + 0.1
    with torch.no_grad():
        module.router.copy_(torch.tensor([[1.0], [0.0], [0.0]]).expand(3, 6))  # all want the first expert
    with receipts() as left:
        y = module(x).y
    for sequence, count in zip(y, kept, strict=True):
        assert (sequence != 0).any(dim=-1).tolist() == [token < count for token in range(9)]
    assert [(entry.where, entry.count) for entry in left.entries] == (
        [("switch", 18 - sum(kept))] if sum(kept) < 18 else []
    )


def test_a_dropped_token_reaches_the_router_by_the_auxiliary_loss_alone() -> None:
    module, x = switch(capacity_factor=1.0, group="sequence"), torch.rand(1, 9, 6)
    with torch.no_grad():
        module.router.copy_(torch.tensor([[1.0], [0.0], [0.0]]).expand(3, 6))
    x.requires_grad_()
    y, _, aux_loss = module(x)
    (of_y,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (of_loss,) = torch.autograd.grad(aux_loss, x)
    assert (of_y[0, 3:] == 0).all()
    assert (of_loss[0, 3:] != 0).any(dim=-1).all()


def test_capacity_in_evaluation_may_differ() -> None:
    module, x = switch(capacity_factor=0.5, evaluation_capacity_factor=3.0), torch.randn(2, 9, 6)
    with receipts() as in_training:
        module(x)
    with receipts() as in_evaluation:
        module.eval()(x)
    assert in_training.entries
    assert not in_evaluation.entries


@pytest.mark.parametrize("factor", [None, 1.0])
@pytest.mark.parametrize("group", ["batch", "sequence"])
def test_padding_goes_nowhere_takes_no_seat_and_counts_in_no_loss(factor: float | None, group: str) -> None:
    module, x = switch(capacity_factor=factor, group=group), torch.randn(2, 9, 6)
    hidden = torch.cat((x, torch.full((2, 4, 6), torch.nan)), dim=1).requires_grad_()
    y, _, aux_loss = module(hidden, mask=Mask.from_lengths([9, 9], 13))
    expected = module(x)
    torch.testing.assert_close(y[:, :9], expected.y)
    torch.testing.assert_close(aux_loss, expected.aux_loss)
    assert (y[:, 9:] == 0).all()
    (y.sum() + aux_loss).backward()
    assert hidden.grad is not None
    assert (hidden.grad[:, 9:] == 0).all()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in module.parameters() if parameter.grad is not None)


def test_a_batch_of_padding_gives_zero() -> None:
    module, x = switch(), torch.full((2, 3, 6), torch.nan)
    y, _, aux_loss = module(x, mask=Mask(valid=torch.zeros(2, 3, dtype=torch.bool)))
    assert (y == 0).all()
    assert float(aux_loss.detach()) == 0


def test_without_capacity_examples_do_not_know_of_each_other() -> None:
    module, x = switch(capacity_factor=None), torch.randn(4, 9, 6)
    alone = torch.cat([module(example[None]).y for example in x])
    torch.testing.assert_close(module(x).y, alone)
    order = torch.randperm(9)
    torch.testing.assert_close(module(x[:, order]).y, module(x).y[:, order])


def test_jitter_moves_the_router_in_training_and_never_what_the_experts_read() -> None:
    module, x = switch(jitter=0.5, experts=1, capacity_factor=None), torch.randn(2, 9, 6)
    assert torch.equal(module.train()(x).y, module.eval()(x).y)  # of one expert the probability is 1
    module, before = switch(jitter=0.5, capacity_factor=None), x.clone()
    assert not torch.equal(module.train()(x).y, module(x).y)
    assert torch.equal(module.eval()(x).y, module(x).y)
    assert torch.equal(x, before)


def test_expert_dropout_is_its_own_rate() -> None:
    module, x = switch(expert_dropout=0.5, dropout=0.0, hidden_dim=50), torch.randn(2, 9, 6)
    assert not torch.equal(module.train()(x).y, module(x).y)
    still = switch(expert_dropout=0.0, dropout=0.5, capacity_factor=None).train()
    y = still(x).y
    assert 0.3 < float((y == 0).float().mean()) < 0.7
    torch.testing.assert_close(y[y != 0], 2 * still.eval()(x).y[y != 0])


def test_weights_are_drawn_small() -> None:
    module = build_feedforward("switch", embed_dim=64, experts=4)
    assert isinstance(module, Switch)
    for weight, inputs in ((module.router, 64), (module.experts.expand, 64), (module.experts.contract, 256)):
        deviation = (0.1 / inputs) ** 0.5
        assert bool((weight.abs() <= 2 * deviation).all())
        assert 0.8 * deviation < float(weight.detach().std()) < deviation
    assert not module.experts.expand_bias.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"jitter": 0.0}, {"experts": 3, "hidden_dim": 5, "balance_weight": 0.0}, {"activation": "relu"}]
)
def test_the_price_is_what_the_counters_count(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_price_is_counted("switch", {"capacity_factor": None} | options, dtype=dtype)


def test_no_more_is_kept_than_of_an_mlp_and_the_routing() -> None:
    x = torch.randn(1, 100, 6, requires_grad=True)
    module = build_feedforward("switch", embed_dim=6, capacity_factor=None, jitter=0.0)
    routing = 4 * (100 * (8 + 1) + 8)
    assert saved_numbers(module, x) <= saved_numbers(build_feedforward("mlp", embed_dim=6), x) + routing


def test_tokens_meet_in_capacity_and_loss() -> None:
    for options, position_wise in (
        ({}, False),
        ({"capacity_factor": None}, False),
        ({"balance_weight": 0.0}, False),
        ({"capacity_factor": None, "balance_weight": 0.0}, True),
    ):
        assert feedforward_config("switch", **options).position_wise == position_wise


def test_bfloat16_is_routed_in_float32() -> None:
    module, x = switch(capacity_factor=None).eval(), torch.randn(2, 30, 6).bfloat16()
    narrow = module.bfloat16()
    y = narrow(x).y
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), narrow.float()(x.float()).y, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "switch: experts must be at least 1, got 0"),
        ({"hidden_dim": 0}, "switch: hidden_dim must be at least 1, got 0"),
        ({"capacity_factor": 0.0}, "switch: capacity_factor must be above 0, got 0.0"),
        ({"capacity_factor": None, "evaluation_capacity_factor": 2.0}, "evaluation_capacity_factor=2.0 goes with a"),
        ({"min_capacity": -1}, "switch: min_capacity must be at least 0, got -1"),
        ({"init_scale": 0}, "switch: init_scale must be above 0, got 0"),
        ({"expert_dropout": 1.0}, r"switch: expert_dropout must be in \[0, 1\), got 1.0"),
        ({"balance_weight": -1}, "switch: balance_weight must be at least 0, got -1"),
        ({"jitter": 1.0}, r"switch: jitter must be in \[0, 1\), got 1.0"),
        ({"group": "core"}, "option 'group' must be one of 'batch', 'sequence', got 'core'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        switch(**options)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"switch: mask.valid must have shape \(B, L\) = \(2, 3\), got \(2, 4\)"):
        switch()(torch.randn(2, 3, 6), mask=Mask.from_lengths([1, 2], 4))
