"""How the two streams of reversible layers end: as their mean, their sum, or side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import batch, blocks_of, build, causal_lm, classifier
from torch import Tensor

from subquad.models import (
    SubquadForCausalLM,
    SubquadForMaskedLM,
    SubquadForPairClassification,
    SubquadForSeq2SeqLM,
    SubquadForSequenceClassification,
    SubquadModel,
    reversible,
)
from subquad.models.pretrained import SubquadPreTrainedModel
from subquad.models.stack import StackInputs

BY_JOIN = pytest.mark.parametrize("join", ["mean", "sum", "concat"])
LABELS = torch.tensor([0, 1, 2])


def loss_of(model: SubquadPreTrainedModel) -> Tensor:
    """Of a head over one sequence, over two, or over every token."""
    tokens, attention = batch()
    torch.manual_seed(1)
    pair = {"pair_input_ids": tokens.flip(1)} if isinstance(model, SubquadForPairClassification) else {}
    labels = tokens if isinstance(model, SubquadForCausalLM) else LABELS
    return model(tokens, attention_mask=attention, labels=labels, **pair).loss


def gradients_of(model: SubquadPreTrainedModel) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@BY_JOIN
@pytest.mark.parametrize("head", [SubquadForSequenceClassification, SubquadForPairClassification, SubquadForCausalLM])
def test_every_head_reads_the_streams_however_they_are_joined(head: Any, join: str) -> None:
    changes = {"reversible_join": join, "tie_word_embeddings": False, "pooling": "mean"}
    model = build(head, residual="reversible", dropout=0.3, **changes).double().train()
    found = gradients_of(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reversible, "couple_reversibly", reversible.couple)
        expected = gradients_of(model)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert all(gradient is not None and bool(gradient.any()) for gradient in expected.values())


@BY_JOIN
def test_the_last_hidden_state_is_the_norm_of_the_joined_streams(join: str) -> None:
    model, (tokens, _) = build(SubquadModel, residual="reversible", reversible_join=join).double(), batch()
    x = model.embedding(model.embedding.prepend_cls(model.embedding.vectors_of(tokens, None)), None, None)
    streams = x, x
    for block in blocks_of(model):
        streams = reversible.couple(reversible.sublayers_of(block, StackInputs()), reversible.Streams(*streams))[:2]
    joined = {"mean": sum(streams) / 2, "sum": sum(streams), "concat": torch.cat(streams, dim=2)}[join]
    for training in (False, True):
        found = model.train(training)(tokens).last_hidden_state
        torch.testing.assert_close(found, model.final_norm(joined)[:, 1:], rtol=1e-12, atol=1e-12)


@BY_JOIN
def test_streams_between_layers_are_joined_as_those_at_the_end(join: str) -> None:
    model, (tokens, _) = build(SubquadModel, residual="reversible", reversible_join=join, pooling="mean"), batch()
    with torch.no_grad():
        output = model(tokens, output_hidden_states=True)
    assert {state.shape for state in output.hidden_states} == {(3, 13, model.config.output_width)}
    assert model.config.output_width == (32 if join == "concat" else 16)
    assert output.pooler_output.shape == (3, model.config.output_width)
    x = model.embedding(model.embedding.vectors_of(tokens, None), None, None)
    expected = {"mean": x, "sum": 2 * x, "concat": torch.cat((x, x), dim=2)}[join]
    torch.testing.assert_close(output.hidden_states[0], expected, rtol=0, atol=0)


@BY_JOIN
def test_a_saved_model_joins_as_it_did(tmp_path: Path, join: str) -> None:
    model, (tokens, attention) = classifier(residual="reversible", reversible_join=join), batch()
    model.save_pretrained(tmp_path)
    loaded = SubquadForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.reversible_join == join
    assert torch.equal(loaded(tokens, attention).logits, model(tokens, attention).logits)


def test_both_streams_side_by_side_generate_as_they_are_read() -> None:
    changes = {"residual": "reversible", "reversible_join": "concat", "tie_word_embeddings": False}
    tokens, _ = batch()
    model: Any = causal_lm(**changes)  # what `generate` asks of its models, the stubs of transformers don't see
    grown = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(grown[:, 13:], model(grown).logits.argmax(dim=-1)[:, 12:-1])


@pytest.mark.parametrize("head", [SubquadForCausalLM, SubquadForMaskedLM])
def test_a_head_tied_to_token_vectors_cant_read_both_streams_side_by_side(head: Any) -> None:
    refusal = (
        r"reversible_join='concat' makes the last hidden state 32 wide, and a head tied to token vectors of "
        r"hidden_size=16 can't read it; use tie_word_embeddings=False, or reversible_join='mean' or 'sum'"
    )
    with pytest.raises(ValueError, match=refusal):
        build(head, residual="reversible", reversible_join="concat")


def test_cross_mixers_cant_read_both_streams_of_an_encoder_side_by_side() -> None:
    refusal = (
        r"reversible_join='concat' makes an encoder's result 32 wide, and the decoder's cross mixers read vectors of "
        r"hidden_size=16; use reversible_join='mean' or 'sum'"
    )
    with pytest.raises(ValueError, match=refusal):
        build(SubquadForSeq2SeqLM, residual="reversible", reversible_join="concat", tie_word_embeddings=False)


def test_a_join_without_two_streams_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reversible_join='sum' joins the two streams .*, got residual='standard'"):
        classifier(reversible_join="sum")
