"""What the backward pass computes again is what the forward pass computed, whatever has run in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from restless import RestlessConfig
from small_models import build
from torch import Tensor

from subquad.models import SubquadForPairClassification, SubquadForSequenceClassification, reversible
from subquad.models.pretrained import SubquadPreTrainedModel
from subquad.registry import register

MOVING: dict[str, dict[str, Any]] = {
    "performer": {"name": "performer", "features": 16, "redraw": 3},
    "performer at every call": {"name": "performer", "features": 16, "redraw": 1},
    "routing": {"name": "routing", "clusters": 4, "window": 6, "decay": 0.5, "commitment": 1.0},
    "restless": {"name": "restless"},
}
BY_MOVING = pytest.mark.parametrize("mixer", MOVING.values(), ids=MOVING)
BY_RESIDUAL = pytest.mark.parametrize("residual", ["reversible", "standard"], ids=["reversible", "checkpointed"])
BY_CALLS = pytest.mark.parametrize(
    "model_class", [SubquadForSequenceClassification, SubquadForPairClassification], ids=["once", "twice"]
)


@pytest.fixture(autouse=True)
def restless() -> None:
    register("restless")(RestlessConfig)


def loss_of(model: SubquadPreTrainedModel, length: int, step: int) -> Tensor:
    """Both towers of a pair run before the backward pass, on tokens that repeat."""
    torch.manual_seed(step)
    tokens = torch.randint(1, 11, (2, length)), torch.randint(1, 11, (2, length))
    pair = {"pair_input_ids": tokens[1]} if isinstance(model, SubquadForPairClassification) else {}
    return model(tokens[0], labels=torch.tensor([0, 2]), **pair).loss


def gradients(model: SubquadPreTrainedModel, *, length: int, steps: int) -> list[dict[str, Tensor]]:
    """Of each step; the parameters stay as they are, buffers don't."""
    found = []
    for step in range(steps):
        model.zero_grad()
        loss_of(model, length, step).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return found


@contextmanager
def plain_autograd() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reversible, "couple_reversibly", reversible.couple)
        yield


def computed_again_and_not(
    model: SubquadPreTrainedModel, *, length: int, steps: int
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    again = deepcopy(model)
    if model.config.residual == "standard":
        again.activation_checkpointing_enable()
    found = gradients(again, length=length, steps=steps)
    with plain_autograd():
        expected = gradients(model, length=length, steps=steps)
    torch.testing.assert_close(dict(again.named_buffers()), dict(model.named_buffers()), rtol=1e-9, atol=1e-12)
    return found, expected


@BY_CALLS
@BY_RESIDUAL
@BY_MOVING
def test_layers_that_change_their_buffers_have_the_gradients_of_plain_autograd(
    mixer: dict[str, Any], residual: str, model_class: Callable[..., SubquadPreTrainedModel]
) -> None:
    model = build(model_class, mixer=mixer, residual=residual, num_hidden_layers=2, pooling="mean", dropout=0.1)
    found, expected = computed_again_and_not(model.double().train(), length=12, steps=4)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@BY_CALLS
@BY_RESIDUAL
def test_ties_of_the_top_scores_are_those_of_the_forward_pass_in_float32(
    residual: str, model_class: Callable[..., SubquadPreTrainedModel]
) -> None:
    """Every score has 1000 added to it, which leaves steps of 1e-4 between them: many tie, and rounding undoes that."""
    mixer = {"name": "topk", "top_k": 4}
    model = build(model_class, mixer=mixer, residual=residual, pooling="mean", num_hidden_layers=4).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("project_query.bias", "project_key.bias")):
                parameter += 1000**0.5 / 8**0.25
    (found,), (expected,) = computed_again_and_not(model, length=128, steps=1)
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-3 * largest, name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_either_kind_of_checkpoint_finds_the_buffers_of_its_call(use_reentrant: bool) -> None:
    model = build(SubquadForPairClassification, mixer=MOVING["routing"], pooling="mean").double().train()
    again = deepcopy(model)
    again.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    found, expected = (gradients(each, length=12, steps=2) for each in (again, model))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
