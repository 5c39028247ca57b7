"""The cache of states: decoding from it is the full forward pass, and it is a holder of values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import STATEFUL, STATELESS, batch, build, causal_lm, classifier, left_padded, small
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from subquad.models import SubquadCache, SubquadForCausalLM, SubquadForMaskedLM
from subquad.models.cache import StateLayer
from subquad.models.state_tensors import state_tensors

BY_STATEFUL = pytest.mark.parametrize("name", STATEFUL)
POSITIONS = ["sinusoidal", "learned", "axial", "rotary", "none"]


def in_pieces(
    model: SubquadForCausalLM, tokens: Tensor, sizes: list[int], attention: Tensor | None = None, **given: Any
) -> tuple[Tensor, SubquadCache]:
    """Logits of all tokens, read one piece after another, and the last cache."""
    cache, logits = SubquadCache(), []
    for part in torch.arange(tokens.shape[1]).split(sizes):
        mask = None if attention is None else attention[:, part]
        output = model(tokens[:, part], mask, past_key_values=cache, **given)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


@BY_STATEFUL
@pytest.mark.parametrize("sizes", [[1] * 13, [13], [6, 1, 1, 5]], ids=["token by token", "at once", "in pieces"])
def test_any_partition_gives_the_logits_of_the_full_forward_pass(name: str, sizes: list[int]) -> None:
    model, (tokens, _) = causal_lm(mixer=small(name)), batch()
    logits, cache = in_pieces(model, tokens, sizes)
    torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-9, atol=1e-9)
    assert cache.get_seq_length() == 13


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.sampled_from(POSITIONS))
def test_positions_go_on_where_a_stream_goes_on(sizes: list[int], positions: str) -> None:
    model, length = causal_lm(positions=positions), min(sum(sizes), 40)
    tokens, _ = batch(length=length, rows=2)
    while sum(sizes) > length:
        sizes = [*sizes[:-1], sizes[-1] - 1] if sizes[-1] > 1 else sizes[:-1]
    logits, _ = in_pieces(model, tokens, sizes)
    torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-9, atol=1e-9)


@BY_STATEFUL
def test_padding_on_the_left_changes_no_logit_of_a_stream(name: str) -> None:
    model, (tokens, attention) = causal_lm(mixer=small(name)), left_padded()
    for sizes in ([5, 8], [13], [1] * 13):
        logits, _ = in_pieces(model, tokens, sizes, attention)
        for row, valid in enumerate(attention.bool()):
            alone, _ = in_pieces(model, tokens[row : row + 1, valid], [int(valid.sum())])
            torch.testing.assert_close(logits[row, valid], alone[0], rtol=1e-9, atol=1e-9)


def test_the_attention_mask_of_all_tokens_so_far_says_the_same_as_that_of_the_new_ones() -> None:
    model, (tokens, attention) = causal_lm(), left_padded()
    cache = model(tokens[:, :9], attention[:, :9], use_cache=True).past_key_values
    expected = model(tokens[:, 9:], attention[:, 9:], past_key_values=cache).logits
    assert torch.equal(model(tokens[:, 9:], attention, past_key_values=cache).logits, expected)
    with pytest.raises(ValueError, match=r"\(B, L\) = \(3, 4\), or \(B, past \+ L\) = \(3, 13\), got \(3, 12\)"):
        model(tokens[:, 9:], attention[:, 1:], past_key_values=cache)


@BY_STATEFUL
def test_a_call_leaves_the_cache_as_it_was(name: str) -> None:
    model, (tokens, _) = causal_lm(mixer=small(name)), batch()
    cache = model(tokens[:, :6], use_cache=True).past_key_values
    before = state_tensors(cache.states)
    first = model(tokens[:, 6:9], past_key_values=cache)
    assert first.past_key_values.get_seq_length() == 9
    assert cache.get_seq_length() == 6
    again = model(tokens[:, 6:9], past_key_values=cache)
    assert torch.equal(again.logits, first.logits)
    torch.testing.assert_close(state_tensors(cache.states), before, rtol=0, atol=0)


@BY_STATEFUL
def test_rows_can_be_chosen_repeated_and_put_in_another_order(name: str) -> None:
    model, (tokens, _) = causal_lm(mixer=small(name)), batch()
    rows = torch.tensor([2, 2, 0, 1])
    expected = model(tokens[rows]).logits[:, 8:]
    for change in ("reorder_cache", "batch_select_indices"):
        cache = model(tokens[:, :8], use_cache=True).past_key_values
        getattr(cache, change)(rows)
        logits = model(tokens[rows, 8:], past_key_values=cache).logits
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    cache = model(tokens[:, :8], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([0, 0, 1, 1, 2, 2])
    torch.testing.assert_close(
        model(tokens[rows, 8:], past_key_values=cache).logits, model(tokens[rows]).logits[:, 8:], rtol=1e-9, atol=1e-9
    )


@BY_STATEFUL
@torch.no_grad()
def test_bfloat16_decodes_close_to_the_full_forward_pass(name: str) -> None:
    model, (tokens, _) = causal_lm(mixer=small(name)), batch()
    exact = model.bfloat16().double()(tokens).logits  # with parameters as rounded
    model.bfloat16()
    whole = model(tokens).logits
    logits, cache = in_pieces(model, tokens, [6, 1, 6])
    assert logits.dtype == torch.bfloat16
    floating = {t.dtype for t in state_tensors(cache.states).values() if t.is_floating_point()}
    assert floating <= {torch.float32, torch.float64}
    unavoidable = (whole - exact).norm() / exact.norm()
    assert float((logits - exact).norm() / exact.norm()) < max(0.05, 2 * float(unavoidable))


def test_segments_of_transformer_xl_are_cut_at_the_same_places_however_a_stream_is_read() -> None:
    options = {"memory_length": 8, "segment_length": 4}
    model, (tokens, _) = causal_lm(mixer=small("transformer_xl") | options), batch(length=37)
    expected = model(tokens).logits
    for sizes in ([1] * 37, [3, 9, 1, 24]):
        torch.testing.assert_close(in_pieces(model, tokens, sizes)[0], expected, rtol=1e-9, atol=1e-9)


def test_training_with_checkpoints_keeps_caches() -> None:
    model, (tokens, _) = causal_lm(mixer=small("gated_linear")).train(), batch()
    expected = in_pieces(model, tokens, [6, 7])[0]
    model.activation_checkpointing_enable()
    logits, _ = in_pieces(model, tokens, [6, 7])
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    logits.sum().backward()
    assert model.model.embedding.tokens.weight.grad is not None


def test_a_copy_of_a_cache_goes_its_own_way() -> None:
    model, (tokens, _) = causal_lm(), batch()
    with torch.no_grad():
        cache = model(tokens[:, :9], use_cache=True).past_key_values
    copied = copy.deepcopy(cache)
    copied.reorder_cache(torch.tensor([2, 1, 0]))
    expected = model(tokens).logits[:, 9:]
    torch.testing.assert_close(model(tokens[:, 9:], past_key_values=cache).logits, expected, rtol=1e-9, atol=1e-9)


def test_rows_of_padding_alone_stay_finite() -> None:
    model, (tokens, attention) = causal_lm(), left_padded()
    attention[1] = 0
    logits, cache = in_pieces(model, tokens, [6, 7], attention)
    assert bool(logits.isfinite().all())
    assert cache.states[0].own.length.tolist() == [13, 0, 2]


def test_choosing_rows_changes_the_holder_and_no_state() -> None:
    model, (tokens, _) = causal_lm(), batch()
    cache = model(tokens, use_cache=True).past_key_values
    held = cache.states
    before = state_tensors(held)
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    torch.testing.assert_close(state_tensors(held), before, rtol=0, atol=0)


def test_a_cache_tells_what_it_holds() -> None:
    model, (tokens, _) = causal_lm(), batch()
    cache = model(tokens, use_cache=True).past_key_values
    assert cache.nbytes == sum(tensor.nbytes for tensor in state_tensors(cache.states).values())
    assert (len(cache), cache.batch_size, cache.get_seq_length(), cache.get_max_length()) == (3, 3, 13, -1)
    assert cache.get_mask_sizes(4, 0) == (17, 0)
    assert [cache.is_compileable, cache.is_croppable, *cache.is_sliding] == [False] * 5
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes, cache.states) == (0, 0, [])
    torch.testing.assert_close(model(tokens, past_key_values=cache).logits, model(tokens).logits)


def test_a_state_cannot_be_cropped_or_written_into() -> None:
    model, (tokens, _) = causal_lm(), batch()
    cache = model(tokens, use_cache=True).past_key_values
    with pytest.raises(NotImplementedError, match=r"can't be cropped: .*keep the cache of the shorter prefix"):
        cache.crop(-1)
    with pytest.raises(NotImplementedError, match="holds the states of mixers"):
        cache.update(tokens, tokens, 0)


def test_gradients_flow_through_a_cache_until_it_is_detached() -> None:
    model, (tokens, _) = causal_lm(mixer=small("gated_linear"), num_hidden_layers=1), batch()
    vectors = model.get_input_embeddings()(tokens).detach().requires_grad_()
    cache = model(inputs_embeds=vectors[:, :6], use_cache=True).past_key_values
    model(inputs_embeds=vectors[:, 6:], past_key_values=cache.detach()).logits.sum().backward()
    assert vectors.grad is not None
    assert not vectors.grad[:, :6].any()
    model(inputs_embeds=vectors[:, 6:], past_key_values=cache).logits.sum().backward()
    assert bool(vectors.grad[:, :6].any())


@pytest.mark.parametrize("name", ["full", "local", "linear"])
def test_reversible_layers_decode_from_a_cache_in_evaluation(name: str) -> None:
    model, (tokens, _) = causal_lm(mixer=small(name), residual="reversible"), batch()
    expected = model(tokens).logits
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            logits, _ = in_pieces(model, tokens, [6, 1, 6])
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_packed_documents_go_on_in_a_stream(positions: str) -> None:
    model, (tokens, _) = causal_lm(positions=positions), batch()
    segments = torch.tensor([[0] * 4 + [1] * 5 + [2] * 4]).expand(3, -1)
    expected = model(tokens, segment_ids=segments).logits
    cache = model(tokens[:, :6], segment_ids=segments[:, :6], use_cache=True).past_key_values
    found = model(tokens[:, 6:], segment_ids=segments[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected[:, 6:], rtol=1e-9, atol=1e-9)


def test_positions_inside_segments_are_not_known_across_calls() -> None:
    model, (tokens, _) = causal_lm(), batch()
    with pytest.raises(ValueError, match="pass segment_ids without a cache, or use positions='rotary'"):
        model(tokens, segment_ids=torch.zeros_like(tokens), use_cache=True)


@pytest.mark.parametrize("name", STATELESS)
def test_a_mixer_without_state_has_no_cache(name: str) -> None:
    model, (tokens, _) = causal_lm(mixer=small(name)), batch()
    with pytest.raises(ValueError, match=rf"need mixers with a state; without one: {name}. Pass use_cache=False"):
        model(tokens, use_cache=True)


def test_a_cache_needs_a_causal_model_and_nothing_prepended() -> None:
    tokens, _ = batch()
    with pytest.raises(ValueError, match="need causal=True; this model's mixers see both sides"):
        build(SubquadForMaskedLM).model(tokens, use_cache=True)
    with pytest.raises(ValueError, match="don't go with vectors that the model prepends to every call"):
        classifier(causal=True, pooling="cls").model(tokens, use_cache=True)


def test_caches_of_other_kinds_and_other_models_are_refused() -> None:
    model, (tokens, _) = causal_lm(), batch()
    with pytest.raises(ValueError, match=r"must be a SubquadCache, got DynamicCache; begin with SubquadCache\(\)"):
        model(tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="must be a SubquadCache, got tuple"):
        model(tokens, past_key_values=())
    cache = model(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds the states of 3 layers but this model has 2"):
        causal_lm(num_hidden_layers=2)(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="linear: the state is a"):
        causal_lm(mixer=small("linear"))(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 3 rows but the input has 2; choose rows with batch_select_indices"):
        model(tokens[:2], past_key_values=cache)


def test_a_model_asked_for_no_cache_goes_on_from_one_and_returns_none() -> None:
    model, (tokens, _) = causal_lm(), batch()
    assert model(tokens).past_key_values is None
    cache = model(tokens[:, :6], use_cache=True).past_key_values
    output = model(tokens[:, 6:], past_key_values=cache, use_cache=False)
    torch.testing.assert_close(output.logits, model(tokens).logits[:, 6:], rtol=1e-9, atol=1e-9)
    assert output.past_key_values is None


def test_the_bases_in_transformers_are_as_this_was_written_for() -> None:
    assert CacheLayerMixin.__abstractmethods__ == {
        "lazy_initialization",
        "update",
        "get_mask_sizes",
        "get_seq_length",
        "get_max_length",
    }
    assert not StateLayer.__abstractmethods__
    changed_by_layer = {"reset", "reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices"}
    assert changed_by_layer <= set(vars(Cache))
    assert {"reset", "reorder_cache"} <= set(vars(CacheLayerMixin))
