"""The loss of language models in chunks of tokens: the same values and gradients, without logits, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import VOCABULARY, config
from torch import Tensor

from subquad.benchmark.memory import allocated_peak_bytes
from subquad.models import SubquadForCausalLM, SubquadForMaskedLM, SubquadForSeq2SeqLM
from subquad.models.language_head import SubquadLanguageModel

MODELS = (SubquadForCausalLM, SubquadForMaskedLM, SubquadForSeq2SeqLM)


def language_model(kind: type[SubquadLanguageModel], chunk: int, **changes: Any) -> SubquadLanguageModel:
    torch.manual_seed(0)
    return kind(config(mixer="full", bos_token_id=1, loss_chunk=chunk, **changes)).train()


def tokens_and_labels() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (3, 13))
    return tokens, tokens.masked_fill(torch.rand(3, 13) < 0.3, -100)


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": torch.tensor(50)}], ids=["mean", "part of a batch"])
@pytest.mark.parametrize("residual", ["standard", "reversible"])
@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_the_whole(
    kind: type[SubquadLanguageModel], chunk: int, residual: str, options: dict[str, Tensor]
) -> None:
    tokens, labels = tokens_and_labels()
    results = []
    for size in (0, chunk):
        model = language_model(kind, size, residual=residual)
        output = model(tokens, labels=labels, **options)
        assert (output.logits is None) == bool(size)
        output.loss.backward()
        results.append((output.loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_there_in_evaluation_and_without_labels(kind: type[SubquadLanguageModel]) -> None:
    tokens, labels = tokens_and_labels()
    whole, chunked = (language_model(kind, size) for size in (0, 5))
    inputs = {"labels": labels}
    assert torch.equal(chunked.eval()(tokens, **inputs).logits, whole.eval()(tokens, **inputs).logits)
    inputs = {"decoder_input_ids": tokens} if kind is SubquadForSeq2SeqLM else {}
    assert chunked.train()(tokens, **inputs).logits.shape == (3, 13, VOCABULARY)


def test_bad_labels_are_refused_alike() -> None:
    tokens, labels = tokens_and_labels()
    model = language_model(SubquadForCausalLM, 5)
    with pytest.raises(ValueError, match=rf"labels must be -100 or lie in 0\.\.{VOCABULARY - 1} .* got {VOCABULARY}"):
        model(tokens, labels=labels.masked_fill(labels == -100, VOCABULARY))
    with pytest.raises(ValueError, match=r"shape \(3, 1\), got \(3, 13\); with labels use logits_to_keep=0"):
        model(tokens, labels=labels, logits_to_keep=1)


def test_the_auxiliary_loss_is_added_once() -> None:
    tokens, labels = tokens_and_labels()
    options = {"feedforward": {"name": "switch", "experts": 2}, "num_hidden_layers": 1}
    whole, chunked = (language_model(SubquadForCausalLM, size, **options)(tokens, labels=labels) for size in (0, 5))
    assert whole.aux_loss > 0
    torch.testing.assert_close(chunked.loss, whole.loss, rtol=1e-5, atol=1e-6)


def test_a_training_step_never_holds_all_logits() -> None:
    tokens = torch.randint(4096, (1, 512))
    all_logits = tokens.numel() * 4096 * 4
    peaks = {}
    for chunk in (0, 32):
        model = language_model(SubquadForCausalLM, chunk, vocab_size=4096, max_position_embeddings=512)
        peaks[chunk] = allocated_peak_bytes(lambda model=model: model(tokens, labels=tokens).loss.backward())
    assert peaks[0] > 2 * all_logits
    assert peaks[32] < all_logits / 2
