"""States as named tensors: safetensors can write them, and they come back as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import STATEFUL, batch, causal_lm, seq2seq_lm, small

from subquad.models.state_tensors import state_tensors, states_of_tensors


@pytest.mark.parametrize("name", STATEFUL)
def test_states_come_back_from_a_file_as_they_were(name: str, tmp_path: Path) -> None:
    model, (tokens, _) = causal_lm(mixer=small(name)), batch()
    written = state_tensors(model(tokens, use_cache=True).past_key_values.states)
    save_file(written, tmp_path / "states.safetensors")
    read = states_of_tensors(model.model.blocks, load_file(tmp_path / "states.safetensors"))
    torch.testing.assert_close(state_tensors(read), written, rtol=0, atol=0)


def test_a_decoder_writes_the_states_of_both_its_mixers() -> None:
    model, (tokens, _) = seq2seq_lm(num_hidden_layers=1), batch()
    written = state_tensors(model(tokens, labels=tokens, use_cache=True).past_key_values.states)
    assert {name.rsplit(".", 1)[0] for name in written} == {"layers.0.own", "layers.0.cross"}
    torch.testing.assert_close(state_tensors(states_of_tensors(model.decoder.blocks, written)), written, rtol=0, atol=0)


def test_states_of_another_model_are_refused() -> None:
    model, (tokens, _) = causal_lm(), batch()
    written = state_tensors(model(tokens, use_cache=True).past_key_values.states)
    with pytest.raises(ValueError, match=r"written by another model: 0 tensors are missing \[\], and \d+ are unknown"):
        states_of_tensors(causal_lm(num_hidden_layers=2).model.blocks, written)
