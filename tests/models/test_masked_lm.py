"""The masked language model: both sides, its loss, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import MIXERS, batch, build
from torch import nn
from transformers import AutoModelForMaskedLM

from subquad.build import list_mixers
from subquad.models import SubquadForMaskedLM

BY_MIXER = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)


@BY_MIXER
def test_labels_are_the_tokens_in_their_own_places(mixer: Any) -> None:
    model, (tokens, attention) = build(SubquadForMaskedLM, mixer=mixer).train(), batch()
    labels = torch.full_like(tokens, -100)
    labels[:, 1] = tokens[:, 1]
    hidden = torch.where(labels == -100, tokens, 0)
    output = model(hidden, attention, labels=labels)
    assert output.logits.shape == (3, 13, 11)
    expected = nn.functional.cross_entropy(output.logits[:, 1], tokens[:, 1])
    expected = expected if output.aux_loss is None else expected + output.aux_loss
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(any(name.startswith(f"model.blocks.{layer}.mixer.") for name in reached) for layer in range(3))
    assert {"model.embedding.tokens.weight", "lm_head.project.bias"} <= reached


def test_the_loss_of_a_part_is_divided_by_the_labels_of_the_whole() -> None:
    model, (tokens, _) = build(SubquadForMaskedLM), batch()
    labels = tokens.masked_fill(tokens < 6, -100)
    mean, count = model(tokens, labels=labels).loss, int((labels != -100).sum())
    torch.testing.assert_close(model(tokens, labels=labels, num_items_in_batch=4 * count).loss, mean / 4)


@BY_MIXER
def test_a_loaded_model_gives_the_same_logits(mixer: Any, tmp_path: Path) -> None:
    model, (tokens, attention) = build(SubquadForMaskedLM, mixer=mixer), batch()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)  # nothing may be drawn anew
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert isinstance(loaded, SubquadForMaskedLM)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    # Loaded tensors lie elsewhere in memory, and products of matrices round by how they are aligned.
    torch.testing.assert_close(loaded(tokens, attention).logits, model(tokens, attention).logits, rtol=1e-5, atol=1e-5)
    assert loaded.lm_head.project.weight is loaded.get_input_embeddings().weight


def test_a_model_that_sees_one_side_is_refused() -> None:
    with pytest.raises(ValueError, match="causal=True has no meaning here; use causal=False, or SubquadForCausalLM"):
        build(SubquadForMaskedLM, causal=True)


@pytest.mark.parametrize("name", list_mixers(bidirectional=False))
def test_a_mixer_with_a_causal_form_alone_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: causal=False is not supported; mechanisms that support it: aft, "):
        build(SubquadForMaskedLM, mixer=name)
