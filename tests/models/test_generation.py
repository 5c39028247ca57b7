"""`generate`: from a cache as without one, over every causal mixer; where there can be none, it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CAUSAL, STATEFUL, STATELESS, batch, causal_lm, left_padded, small
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationMixin

from subquad import receipts
from subquad.models import SubquadCache, SubquadForCausalLM
from subquad.models.generation import SubquadGeneratingModel

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 7}
STRATEGIES: dict[str, dict[str, Any]] = {"greedy": GREEDY, "beams": GREEDY | {"num_beams": 3}}
FURTHER: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "max_new_tokens": 7, "top_k": 5, "temperature": 0.8},
    "several samples": {"do_sample": True, "max_new_tokens": 7, "num_return_sequences": 2},
    "a prompt in pieces": GREEDY | {"prefill_chunk_size": 4},
}


def generate(model: Any, tokens: Tensor, attention: Tensor | None = None, **given: Any) -> Any:
    torch.manual_seed(3)
    attention = torch.ones_like(tokens) if attention is None else attention
    return model.generate(tokens, attention_mask=attention, **given)


CACHED = [(name, label) for name in STATEFUL for label in STRATEGIES]
CACHED += [(name, label) for name in ("local", "linear", "transformer_xl") for label in FURTHER]


@pytest.mark.parametrize(("name", "label"), CACHED)
def test_a_cache_changes_no_token(name: str, label: str) -> None:
    strategy = (STRATEGIES | FURTHER)[label]
    model, (tokens, _) = causal_lm(mixer=small(name)), batch()
    expected = generate(model, tokens, use_cache=False, **{**strategy, "prefill_chunk_size": None})
    with receipts() as left:
        assert torch.equal(generate(model, tokens, **strategy), expected)
    assert not [receipt for receipt in left.entries if receipt.asked == "generate"]


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_tokens_are_the_most_probable_ones(name: str) -> None:
    model, (tokens, _) = causal_lm(mixer=small(name)), batch()
    generated = generate(model, tokens, **GREEDY)
    assert generated.shape == (3, 20)
    assert torch.equal(generated[:, 13:], model(generated).logits[:, 12:-1].argmax(dim=-1))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CAUSAL)
def test_padding_on_the_left_changes_no_token(name: str, strategy: str) -> None:
    model, (tokens, attention) = causal_lm(mixer=small(name)), left_padded()
    generated = generate(model, tokens, attention, **STRATEGIES[strategy])
    for row, valid in enumerate(attention.bool()):
        alone = generate(model, tokens[row : row + 1, valid], **STRATEGIES[strategy])
        assert torch.equal(generated[row, 13:], alone[0, -7:])


@pytest.mark.parametrize("name", STATEFUL)
def test_going_on_from_a_returned_cache_is_generation_in_one_go(name: str) -> None:
    model, (tokens, attention) = causal_lm(mixer=small(name)), left_padded()
    expected = generate(model, tokens, attention, **GREEDY)
    first = generate(model, tokens, attention, **GREEDY | {"max_new_tokens": 3}, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, SubquadCache)
    assert first.past_key_values.get_seq_length() == 15  # the last token was not read
    longer = torch.cat((attention, torch.ones(3, 3, dtype=torch.int64)), dim=1)
    for _ in range(2):  # the cache is as good as new
        given = GREEDY | {"max_new_tokens": 4, "past_key_values": first.past_key_values}
        assert torch.equal(generate(model, first.sequences, longer, **given), expected)


def test_a_conversation_goes_on_with_new_tokens() -> None:
    model, (tokens, _) = causal_lm(), batch()
    first = generate(model, tokens, **GREEDY, return_dict_in_generate=True)
    turn = torch.cat((first.sequences, tokens[:, :4]), dim=1)
    expected = generate(model, turn, **GREEDY)
    assert torch.equal(generate(model, turn, **GREEDY, past_key_values=first.past_key_values), expected)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_loaded_model_generates_the_same_tokens(name: str, tmp_path: Path) -> None:
    model, (tokens, _) = causal_lm(mixer=small(name)).float(), batch()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, SubquadForCausalLM)
    assert loaded.generation_config.use_cache == model.generation_config.use_cache
    assert torch.equal(generate(loaded, tokens, **GREEDY), generate(model, tokens, **GREEDY))


@pytest.mark.parametrize("name", STATELESS)
def test_without_states_the_prefix_is_computed_again_and_a_receipt_says_so(name: str) -> None:
    model, (tokens, _) = causal_lm(mixer=["full", small(name)]), batch()
    with receipts() as left:
        generate(model, tokens, **GREEDY)
    found = [(receipt.where, receipt.ran, receipt.reason) for receipt in left.entries if receipt.asked == "generate"]
    assert found == [
        ("SubquadForCausalLM", "the whole prefix again for every token", f"mixers without a state: {name}")
    ]
    with pytest.raises(ValueError, match=rf"need mixers with a state; without one: {name}. Pass use_cache=False"):
        generate(model, tokens, use_cache=True, **GREEDY)


def test_generation_stops_at_the_end_of_a_text() -> None:
    model, (tokens, _) = causal_lm(), batch(rows=1)
    end = int(generate(model, tokens, **GREEDY)[0, 15])
    stopping = causal_lm(eos_token_id=end)
    generated = generate(stopping, tokens, **GREEDY)
    assert int(generated[0, -1]) == end
    assert generated.shape[1] <= 16


def test_vectors_in_place_of_a_prompt_give_the_same_tokens() -> None:
    model, (tokens, _) = causal_lm(), batch()
    vectors = model.get_input_embeddings()(tokens)
    found = generate(model, tokens[:, :0], torch.ones_like(tokens), inputs_embeds=vectors, **GREEDY)
    assert torch.equal(found, generate(model, tokens, **GREEDY)[:, 13:])


def test_the_stream_between_layers_is_returned_where_it_is_asked_for() -> None:
    model, (tokens, _) = causal_lm(), batch()
    output = generate(model, tokens, **GREEDY, return_dict_in_generate=True, output_hidden_states=True)
    assert [[tuple(x.shape) for x in step] for step in output.hidden_states] == [
        [(3, length, 16)] * 4 for length in (13, 1, 1, 1, 1, 1, 1)
    ]
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        generate(model, tokens, **GREEDY, return_dict_in_generate=True, output_attentions=True)


def test_what_needs_a_cache_of_keys_and_values_is_refused() -> None:
    model, (tokens, _) = causal_lm(), batch(rows=1)
    with pytest.raises(ValueError, match="cache_implementation='static' chooses a cache of keys and values"):
        generate(model, tokens, cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, tokens, prompt_lookup_num_tokens=2, **GREEDY)


def test_the_private_names_of_transformers_are_as_this_was_written_for() -> None:
    overridden = {
        "_supports_default_dynamic_cache",
        "_prepare_cache_for_generation",
        "_maybe_prepare_encoder_kwargs_for_generation",
    }
    assert overridden <= set(vars(GenerationMixin))
    assert overridden <= set(vars(SubquadGeneratingModel))
    assert SubquadForCausalLM._is_stateful
    assert SubquadForCausalLM.can_generate()
