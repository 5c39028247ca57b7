"""Encoder and decoder: decoding from a cache is the full forward pass, and `generate` from one as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import (
    CROSS,
    ENCODERS,
    STATEFUL,
    STATELESS,
    batch,
    blocks_of,
    decoder_of,
    encoder_of,
    seq2seq_lm,
    small,
    target,
)
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from subquad import receipts
from subquad.build import list_mixers
from subquad.models import SubquadCache, SubquadForSeq2SeqLM

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}


def generate(model: Any, tokens: Tensor, attention: Tensor | None = None, **given: Any) -> Any:
    attention = torch.ones_like(tokens) if attention is None else attention
    return model.generate(tokens, attention_mask=attention, **given)


@pytest.mark.parametrize("name", STATEFUL)
def test_decoding_in_pieces_is_the_full_forward_pass(name: str) -> None:
    model, (source, attention), tokens = decoder_of(name), batch(), target()
    whole = model(source, attention, decoder_input_ids=tokens)
    for sizes in ([1] * 7, [3, 4], [7]):
        cache, logits = SubquadCache(), []
        for part in tokens.split(sizes, dim=1):
            output = model(source, attention, decoder_input_ids=part, past_key_values=cache)
            cache = output.past_key_values
            logits.append(output.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CROSS)
def test_decoding_in_pieces_is_the_full_forward_pass_whatever_stands_between(name: str) -> None:
    model, (source, attention), tokens = seq2seq_lm(cross_mixer=small(name)), batch(), target()
    encoded = model.encoder(source, attention)
    whole = model(source, attention, decoder_input_ids=tokens)
    cache, logits = SubquadCache(), []
    for part in tokens.split([2, 1, 4], dim=1):
        output = model(None, attention, decoder_input_ids=part, encoder_outputs=encoded, past_key_values=cache)
        cache = output.past_key_values
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "axial", "rotary", "none"])
def test_positions_of_the_target_go_on_whatever_the_source_and_the_padding_are(positions: str) -> None:
    model, (source, attention), tokens = seq2seq_lm(positions=positions), batch(), target()
    padded = torch.tensor([[1] * 7, [0] * 2 + [1] * 5, [0] * 6 + [1]])
    cache, logits = SubquadCache(), []
    for part in torch.arange(7).split([3, 1, 3]):
        given = {"decoder_input_ids": tokens[:, part], "decoder_attention_mask": padded[:, part]}
        output = model(source, attention, past_key_values=cache, **given)
        cache = output.past_key_values
        logits.append(output.logits)
    for row, valid in enumerate(padded.bool()):
        alone = model(
            source[row : row + 1], attention[row : row + 1], decoder_input_ids=tokens[row : row + 1, valid]
        ).logits
        torch.testing.assert_close(torch.cat(logits, dim=1)[row, valid], alone[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list_mixers(cross=True, state=True))
def test_the_source_is_projected_once(name: str) -> None:
    model, (source, attention) = seq2seq_lm(cross_mixer=small(name)), batch()
    given: list[Any] = []
    for block in blocks_of(model.decoder):
        assert block.cross_mixer is not None
        block.cross_mixer.register_forward_hook(
            lambda _module, inputs, kwargs, _output: given.append((*inputs, None)[1]), with_kwargs=True
        )
    generate(model, source, attention, **GREEDY)
    layers, steps = 3, 6
    assert len(given) == layers * steps
    assert all(context is not None for context in given[:layers])
    assert all(context is None for context in given[layers:])


@pytest.mark.parametrize("name", CROSS)
def test_padding_of_the_source_changes_no_token(name: str) -> None:
    model, (source, attention) = seq2seq_lm(cross_mixer=small(name)), batch()
    generated = generate(model, source, attention, **GREEDY)
    for row, kept in enumerate(attention.sum(dim=1).tolist()):
        assert torch.equal(generate(model, source[row : row + 1, :kept], **GREEDY)[0], generated[row])


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_cache_changes_no_token(name: str, strategy: dict[str, Any]) -> None:
    model, (source, attention) = decoder_of(name), batch()
    expected = generate(model, source, attention, use_cache=False, **GREEDY, **strategy)
    assert torch.equal(generate(model, source, attention, **GREEDY, **strategy), expected)


def test_going_on_from_a_returned_cache_is_generation_in_one_go() -> None:
    model, (source, attention) = seq2seq_lm(), batch()
    expected = generate(model, source, attention, **GREEDY)
    first = generate(model, source, attention, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    more = {"decoder_input_ids": first.sequences, "past_key_values": first.past_key_values, "max_new_tokens": 3}
    more["decoder_attention_mask"] = torch.ones_like(first.sequences)
    assert torch.equal(generate(model, source, attention, do_sample=False, **more), expected)


@pytest.mark.parametrize("name", STATELESS)
def test_without_states_the_target_is_computed_again_and_a_receipt_says_so(name: str) -> None:
    model, (source, attention) = decoder_of(name), batch()
    with receipts() as left:
        generated = generate(model, source, attention, **GREEDY)
    assert [receipt.reason for receipt in left.entries if receipt.asked == "generate"] == [
        f"mixers without a state: {name}"
    ]
    logits = model(source, attention, decoder_input_ids=generated).logits
    assert torch.equal(generated[:, 1:], logits[:, :-1].argmax(dim=-1))


@pytest.mark.parametrize("mixer", ENCODERS)
def test_a_loaded_model_generates_the_same_tokens(mixer: str, tmp_path: Path) -> None:
    model, (source, attention) = encoder_of(mixer, mixer="local").float(), batch()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)  # nothing may be drawn anew
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert isinstance(loaded, SubquadForSeq2SeqLM)
    assert torch.equal(generate(loaded, source, attention, **GREEDY), generate(model, source, attention, **GREEDY))


def test_reversible_layers_decode_from_a_cache_in_evaluation() -> None:
    model, (source, attention) = seq2seq_lm(residual="reversible"), batch()
    expected = generate(model, source, attention, use_cache=False, **GREEDY)
    assert torch.equal(generate(model, source, attention, **GREEDY), expected)
