"""Feed-forwards with experts beside every kind of mixer, in every kind of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import batch, blocks_of, classifier, config, small
from torch import Tensor

from subquad import receipts
from subquad.build import list_feedforwards, list_mixers, mixer_config
from subquad.feedforward.switch import Switch
from subquad.layers.expert_mixer import ExpertMixer
from subquad.models import SubquadConfig, SubquadForSequenceClassification, reversible

SUBLAYERS = [name for name in list_mixers(bidirectional=True) if mixer_config(name).placement == "sublayer"]
FAMILIES = list({mixer_config(name).family: name for name in SUBLAYERS}.values())
WITH_EXPERTS = ("switch", "moe")
LABELS = torch.tensor([0, 1, 2])


def model_of(feedforward: str, mixer: str = "full", **changes: Any) -> SubquadForSequenceClassification:
    written = {"name": feedforward, "experts": 4, "capacity_factor": 1.25, "min_capacity": 1}
    return classifier(mixer=small(mixer), feedforward=written, **changes).double().train()


def step(model: SubquadForSequenceClassification) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Loss, auxiliary loss and gradients."""
    tokens, attention = batch()
    torch.manual_seed(1)
    model.zero_grad()
    output = model(tokens, attention_mask=attention, labels=LABELS)
    output.loss.backward()
    return output.loss.detach(), output.aux_loss.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("mixer", FAMILIES)
@pytest.mark.parametrize("feedforward", WITH_EXPERTS)
def test_reversible_layers_route_in_the_recompute_as_they_did(feedforward: str, mixer: str) -> None:
    model = model_of(feedforward, mixer, residual="reversible", dropout=0.3)
    with receipts() as left:
        found = step(model)
    with pytest.MonkeyPatch.context() as patch, receipts() as of_definition:
        patch.setattr(reversible, "couple_reversibly", reversible.couple)
        expected = step(model)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert left.entries == of_definition.entries  # what was dropped is noted once


@pytest.mark.parametrize("mixer", SUBLAYERS)
@pytest.mark.parametrize("feedforward", WITH_EXPERTS)
def test_the_losses_of_all_layers_are_in_the_loss(feedforward: str, mixer: str) -> None:
    model = model_of(feedforward, mixer)
    losses: list[Tensor] = []
    for block in blocks_of(model.model):
        for module in (block.mixer, block.feedforward):
            assert module is not None
            module.register_forward_hook(lambda _module, _inputs, mixed: losses.append(mixed.aux_loss))
    tokens, attention = batch()
    output = model(tokens, attention_mask=attention, labels=LABELS)
    added = sum(loss for loss in losses if loss is not None)
    torch.testing.assert_close(output.aux_loss, added)
    cross_entropy = torch.nn.functional.cross_entropy(output.logits, LABELS)
    torch.testing.assert_close(output.loss, cross_entropy + output.aux_loss)
    assert model.eval()(tokens, attention_mask=attention).aux_loss is None


@pytest.mark.parametrize("feedforward", list_feedforwards())
def test_a_config_and_a_model_come_back_from_disk(feedforward: str, tmp_path: Path) -> None:
    model = classifier(feedforward={"name": feedforward})
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)  # nothing may be drawn anew
    loaded = SubquadForSequenceClassification.from_pretrained(tmp_path).eval()
    tokens, attention = batch()
    assert torch.equal(loaded(tokens, attention).logits, model(tokens, attention).logits)
    assert loaded.config.layer_feedforwards() == model.config.layer_feedforwards()


def test_options_are_written_with_the_model() -> None:
    written = {"name": "switch", "experts": 4}
    again = SubquadConfig.from_dict(config(feedforward=written).to_dict())
    assert again.feedforward == written
    (first, *_) = again.layer_feedforwards()
    assert first is not None
    assert first.to_dict() | written | {"hidden_dim": 24} == first.to_dict()


def test_every_second_layer_can_have_experts() -> None:
    model = classifier(feedforward=["mlp", {"name": "switch", "experts": 4}], num_hidden_layers=4)
    kinds = [isinstance(block.feedforward, Switch) for block in blocks_of(model.model)]
    assert kinds == [False, True, False, True]


def test_a_fresh_model_draws_the_experts_small() -> None:
    model = SubquadForSequenceClassification(config(feedforward="switch", hidden_size=64))
    for block in blocks_of(model.model):
        assert isinstance(block.feedforward, ExpertMixer)
        deviation = (0.1 / 64) ** 0.5
        assert float(block.feedforward.experts.expand.detach().abs().max()) <= 2 * deviation
        assert not block.feedforward.experts.expand_bias.any()


def test_chunks_are_refused_where_tokens_meet_and_change_nothing_where_not() -> None:
    with pytest.raises(ValueError, match="switch: doesn't promise that a token's result depends on it alone"):
        classifier(feedforward="switch", feedforward_chunk=4)
    alone = {"name": "switch", "capacity_factor": None, "balance_weight": 0.0, "jitter": 0.0}
    whole, parts = (classifier(feedforward=alone, feedforward_chunk=size).train() for size in (0, 4))
    tokens, attention = batch()
    torch.testing.assert_close(parts(tokens, attention).logits, whole(tokens, attention).logits)


@pytest.mark.parametrize("feedforward", WITH_EXPERTS)
def test_the_price_of_a_model_counts_every_expert(feedforward: str) -> None:
    model = model_of(feedforward).model
    parameters = [parameter.numel() for name, parameter in model.blocks.named_parameters() if "norm" not in name]
    assert model.cost(10).parameters == sum(parameters)


def test_checkpoints_of_activations_give_the_same_gradients() -> None:
    model = model_of("switch")
    expected = step(model)
    model.activation_checkpointing_enable()
    torch.testing.assert_close(step(model), expected)
