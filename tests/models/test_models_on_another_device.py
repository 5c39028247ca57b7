"""Models compute on whichever device they were moved to, and the same as on the CPU: losses, gradients, tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from another_device import another_device, here, there
from small_models import CAUSAL, CROSS, MIXERS, batch, build, causal_lm, classifier, decoder_of, small, target
from torch import Tensor

from subquad.benchmark.probe_subject import EQUAL, difference
from subquad.build import mixer_config
from subquad.models import SubquadForMaskedLM

SUBLAYERS = [name for name in CAUSAL if mixer_config(name).placement == "sublayer"]
TOKENS, KEPT = batch()


def moved(model: Any) -> Any:
    """The model on the other device, with what it ties still tied."""
    there(model).tie_weights()
    return model


def step(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, logits and all gradients, by name."""
    torch.manual_seed(3)
    out = model.train()(**given)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss, "logits": out.logits} | gradients


def assert_step_is_that_of_the_cpu(make: Callable[[], Any], **given: Tensor) -> None:
    expected = step(make(), given)
    with another_device():
        found = step(moved(make()), there(given))
    assert found.keys() == expected.keys()
    for name, x in here(found).items():
        assert difference(x, expected[name].detach()) <= EQUAL, name


@pytest.mark.parametrize("name", CAUSAL)
def test_language_models_take_the_same_step(name: str) -> None:
    assert_step_is_that_of_the_cpu(
        lambda: causal_lm(mixer=small(name)), input_ids=TOKENS, attention_mask=KEPT, labels=TOKENS
    )


@pytest.mark.parametrize("name", MIXERS)
def test_classifiers_take_the_same_step(name: str) -> None:
    labels = torch.tensor([0, 1, 2])
    assert_step_is_that_of_the_cpu(
        lambda: classifier(mixer=MIXERS[name]).double(), input_ids=TOKENS, attention_mask=KEPT, labels=labels
    )


def test_models_of_hidden_tokens_take_the_same_step() -> None:
    assert_step_is_that_of_the_cpu(
        lambda: build(SubquadForMaskedLM, mixer=MIXERS["a mixed list"]).double(),
        input_ids=TOKENS,
        attention_mask=KEPT,
        labels=TOKENS,
    )


@pytest.mark.parametrize("name", CROSS)
def test_encoders_and_decoders_take_the_same_step(name: str) -> None:
    assert_step_is_that_of_the_cpu(
        lambda: decoder_of("full", cross_mixer=small(name)), input_ids=TOKENS, attention_mask=KEPT, labels=target()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBLAYERS)
def test_reversible_layers_take_the_same_step(name: str) -> None:
    """With dropout, whose numbers the pass back draws again."""
    assert_step_is_that_of_the_cpu(
        lambda: causal_lm(mixer=small(name), residual="reversible", dropout=0.1, feedforward_chunk=5),
        input_ids=TOKENS,
        attention_mask=KEPT,
        labels=TOKENS,
    )


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "axial", "rotary", "none"])
def test_positions_are_made_where_the_tokens_are(positions: str) -> None:
    assert_step_is_that_of_the_cpu(
        lambda: causal_lm(mixer=small("full"), positions=positions), input_ids=TOKENS, labels=TOKENS
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_beams_generate_the_same_tokens(name: str) -> None:
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "num_beams": 3}
    model: Any = causal_lm(mixer=small(name))
    everything = torch.ones_like(TOKENS)
    expected = model.generate(TOKENS, attention_mask=everything, **settings)
    with another_device():
        found = moved(model).generate(there(TOKENS), attention_mask=there(everything), **settings)
    assert torch.equal(here(found), expected)
