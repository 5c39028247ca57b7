"""The causal language model: no future, its loss, its head, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CAUSAL, batch, blocks_of, build, causal_lm, classifier, config, seq2seq_lm, small
from torch import nn

from subquad.build import list_mixers
from subquad.models import SubquadForCausalLM, SubquadForMaskedLM, SubquadForPairClassification

BY_MIXER = pytest.mark.parametrize("name", CAUSAL)


@BY_MIXER
def test_no_logit_depends_on_a_later_token(name: str) -> None:
    model, (tokens, _) = causal_lm(mixer=small(name)), batch(rows=1)
    other = torch.cat((tokens[:, :7], tokens[:, 7:] % 10 + 1), dim=1)
    logits, changed = model(tokens).logits, model(other).logits
    # Tokens that are sorted into clusters are added up in an order that later tokens change: rounding, and no more.
    torch.testing.assert_close(logits[:, :7], changed[:, :7], rtol=1e-12, atol=1e-12)
    assert not torch.equal(logits[:, 7:], changed[:, 7:])


@BY_MIXER
def test_a_prefix_alone_has_the_logits_that_it_has_in_the_whole(name: str) -> None:
    model, (tokens, _) = causal_lm(mixer=small(name)), batch()
    whole = model(tokens).logits
    for length in (1, 6, 12):
        torch.testing.assert_close(model(tokens[:, :length]).logits, whole[:, :length], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in list_mixers() if name not in CAUSAL])
def test_a_mixer_without_causal_form_is_refused_with_the_list_of_those_that_have_one(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: causal=True is not supported; .*full, gated_linear"):
        causal_lm(mixer=small(name))


def test_the_model_is_causal_whatever_its_config_said() -> None:
    asked = config()
    model = SubquadForCausalLM(asked)
    assert model.config.causal
    assert not asked.causal


def test_the_loss_is_the_mean_over_the_next_tokens_that_are_labelled() -> None:
    model, (tokens, attention) = causal_lm(), batch()
    labels = tokens.masked_fill(attention == 0, -100)
    output = model(tokens, attention, labels=labels)
    losses = [
        -output.logits[row, place].log_softmax(dim=-1)[labels[row, place + 1]]
        for row in range(3)
        for place in range(12)
        if labels[row, place + 1] != -100
    ]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean().float(), rtol=1e-6, atol=1e-6)
    parts = model(tokens, attention, labels=labels, num_items_in_batch=50)
    torch.testing.assert_close(parts.loss, torch.stack(losses).sum().float() / 50, rtol=1e-6, atol=1e-6)


def test_what_layers_add_to_the_loss_is_in_the_loss() -> None:
    model, (tokens, _) = causal_lm(mixer=small("routing")).train(), batch()
    output = model(tokens, labels=tokens)
    assert float(output.aux_loss.detach()) > 0
    cross_entropy = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(output.loss, (cross_entropy + output.aux_loss).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("hidden", [0, 3])
def test_a_part_of_a_batch_weighs_both_losses_by_the_tokens_that_it_predicts(hidden: int) -> None:
    model, (tokens, _) = causal_lm(mixer=small("routing")).train(), batch()
    labels = tokens.clone()
    labels[0, :hidden] = -100
    predicted = [(row, place) for row in range(3) for place in range(1, tokens.shape[1]) if row > 0 or place >= hidden]
    output = model(tokens, labels=labels, num_items_in_batch=50)
    log = output.logits.log_softmax(dim=-1)
    cross_entropy = -torch.stack([log[row, place - 1, tokens[row, place]] for row, place in predicted]).mean()
    expected = (cross_entropy + output.aux_loss) * len(predicted) / 50
    torch.testing.assert_close(output.loss, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kept", [0, 1, 4, torch.tensor([2, 5])])
def test_logits_of_some_tokens_are_those_among_all(kept: Any) -> None:
    model, (tokens, _) = causal_lm(), batch()
    expected = model(tokens).logits
    expected = expected[:, kept] if isinstance(kept, torch.Tensor) else expected[:, -kept:]
    torch.testing.assert_close(model(tokens, logits_to_keep=kept).logits, expected, rtol=1e-12, atol=1e-12)


def test_labels_need_all_logits() -> None:
    model, (tokens, _) = causal_lm(), batch()
    with pytest.raises(ValueError, match=r"shape \(3, 1\), got \(3, 13\); with labels use logits_to_keep=0"):
        model(tokens, labels=tokens, logits_to_keep=1)


@pytest.mark.parametrize("model_class", [SubquadForCausalLM, SubquadForMaskedLM])
def test_word_embeddings_are_tied_where_the_config_says_so(model_class: Any) -> None:
    for tie in (True, False):
        model = build(model_class, tie_word_embeddings=tie)
        assert (model.lm_head.project.weight is model.get_input_embeddings().weight) == tie
        assert len(model._tied_weights_keys) == tie


def test_logits_of_a_fresh_model_have_the_size_of_one_whether_tied_or_not() -> None:
    tokens = torch.randint(0, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    for tie in (True, False):
        torch.manual_seed(0)
        model = SubquadForCausalLM(config(vocab_size=500, hidden_size=64, tie_word_embeddings=tie))
        assert 0.3 < float(model(tokens).logits.detach().std()) < 2


def test_a_larger_vocabulary_keeps_the_head_tied() -> None:
    model = causal_lm().float()
    model.resize_token_embeddings(15)
    assert model.lm_head.project.weight is model.get_input_embeddings().weight
    assert model(torch.tensor([[14, 3]])).logits.shape == (1, 2, 15)


@pytest.mark.parametrize(("token", "found"), [(11, 11), (-1, -1)])
def test_a_token_outside_the_vocabulary_is_refused(token: int, found: int) -> None:
    model = causal_lm()
    with pytest.raises(ValueError, match=rf"input_ids must lie in 0\.\.10 \(vocab_size=11\), got {found}"):
        model(torch.tensor([[3, token]]))
    with pytest.raises(ValueError, match=rf"labels must be -100 or lie in 0\.\.10 \(vocab_size=11\), got {found}"):
        model(torch.tensor([[3, 4]]), labels=torch.tensor([[3, token]]))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"input_ids must have shape \(B, L\) with at least one token, got \(3,\)"),
        (torch.zeros(1, 0, dtype=torch.int64), r"with at least one token, got \(1, 0\)"),
        (torch.zeros(1, 3), r"input_ids must hold integers, got torch.float32; pass vectors as inputs_embeds"),
    ],
)
def test_what_is_no_batch_of_tokens_is_refused(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_lm()(tokens)


@pytest.mark.parametrize("name", list_mixers(causal=True, fixed_length=True))
def test_a_context_longer_than_a_fixed_length_is_refused(name: str) -> None:
    model = causal_lm(mixer=small(name))
    model(torch.ones(1, 40, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"{name}: x has length 41 but was built for max_length=40"):
        model(torch.ones(1, 41, dtype=torch.int64))


@pytest.mark.parametrize("name", list_mixers(causal=True, fixed_length=True, state=True))
def test_a_stream_that_grows_longer_than_a_fixed_length_is_refused(name: str) -> None:
    model = causal_lm(mixer=small(name))
    cache = model(torch.ones(1, 40, dtype=torch.int64), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=rf"{name}: .*max_length=40; build it with a larger max_length"):
        model(torch.ones(1, 1, dtype=torch.int64), past_key_values=cache)


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"position_ids": torch.zeros(3, 13)}, "position_ids is not supported; .* pass segment_ids"),
        ({"token_type_ids": torch.zeros(3, 13)}, "token_type_ids is not supported; .*return_token_type_ids=False"),
        ({"output_attentions": True}, "output_attentions is not supported; these mixers have no attention matrices"),
        ({"return_dict": False}, r"return_dict=False is not supported; call the output's .to_tuple"),
        ({"attention_masks": None}, "unknown input 'attention_masks'; did you mean 'attention_mask'"),
        ({"ignore_index": 0}, "unknown input 'ignore_index'; known: .*num_items_in_batch"),
    ],
)
def test_what_this_model_would_ignore_is_refused(given: dict[str, Any], advice: str) -> None:
    tokens, _ = batch()
    pairs, translator = build(SubquadForPairClassification), seq2seq_lm()
    for model in (causal_lm(), causal_lm().model, classifier(), build(SubquadForMaskedLM), pairs, translator):
        with pytest.raises(ValueError, match=f"{type(model).__name__}: {advice}"):
            model(tokens, **given)


def test_what_transformers_passes_to_every_model_is_taken() -> None:
    tokens, _ = batch()
    passed = {"return_dict": True, "output_attentions": None, "output_hidden_states": False, "num_items_in_batch": 3}
    pairs = build(SubquadForPairClassification)
    assert torch.equal(
        pairs(tokens, pair_input_ids=tokens, **passed).logits, pairs(tokens, pair_input_ids=tokens).logits
    )
    for model in (causal_lm(), classifier(), build(SubquadForMaskedLM)):
        assert torch.equal(model(tokens, **passed).logits, model(tokens).logits)


@BY_MIXER
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    gradients = []
    tokens, attention = batch()
    for checkpointed in (False, True):
        model = causal_lm(mixer=small(name)).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        model(tokens, attention_mask=attention, labels=tokens).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", list_mixers(causal=True, segments=True))
def test_packed_documents_do_not_mix(name: str) -> None:
    model, (tokens, _) = causal_lm(mixer=small(name)), batch(rows=1)
    packed = model(tokens, segment_ids=torch.tensor([[0] * 5 + [1] * 8])).logits
    torch.testing.assert_close(packed[:, 5:], model(tokens[:, 5:]).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tie", [True, False])
def test_one_pair_of_biases_serves_all_layers_of_transformer_xl(tie: bool, tmp_path: Path) -> None:
    model, (tokens, _) = causal_lm(mixer=small("transformer_xl"), tie_word_embeddings=tie), batch()
    model.save_pretrained(tmp_path)
    loaded = SubquadForCausalLM.from_pretrained(tmp_path).double()
    for each in (model, loaded):
        assert {len(set(map(id, biases))) for biases in shared_by_layer(each)} == {1}
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    loaded.train()(tokens, labels=tokens).loss.backward()
    for first, *_ in shared_by_layer(loaded):
        assert first.grad is not None


def test_layers_of_transformer_xl_have_biases_of_their_own_where_that_is_asked_for() -> None:
    own, shared = (causal_lm(mixer=small("transformer_xl") | {"share_biases": share}) for share in (False, True))
    assert own.num_parameters() == shared.num_parameters() + 2 * 2 * 16  # two more layers, two biases each, of width 16
    assert shared_by_layer(own) == []


def shared_by_layer(model: SubquadForCausalLM) -> list[list[nn.Parameter]]:
    """Each of the parameters that the mixers name as shared, in all layers."""
    mixers = [block.mixer for block in blocks_of(model.model)]
    return [[mixer.get_parameter(name) for mixer in mixers] for name in mixers[0].shared_parameters()]
