"""The parts work together: small models learn to copy and to reverse what they read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.models import SubquadConfig, SubquadForCausalLM, SubquadForSeq2SeqLM

pytestmark = pytest.mark.slow
END = 1


def small_config(**changes: Any) -> SubquadConfig:
    sizes = {"vocab_size": 16, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return SubquadConfig(**sizes, intermediate_size=128, max_position_embeddings=64, **changes)


def words(count: int) -> Tensor:
    return torch.randint(2, 16, (count, 8))


def train(model: Any, batch: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


@pytest.mark.parametrize(
    "changes",
    [{}, {"mixer": "ngram", "encoder_mixer": "full"}, {"cross_mixer": "linear"}, {"residual": "reversible"}],
    ids=str,
)
def test_an_encoder_and_a_decoder_learn_to_reverse(changes: dict[str, Any]) -> None:
    model: Any = SubquadForSeq2SeqLM(small_config(**changes))

    def batch() -> dict[str, Tensor]:
        source = words(32)
        return {"input_ids": source, "labels": source.flip(1)}

    train(model, batch, steps=400)
    source = words(100)
    generated = model.generate(source, do_sample=False, max_new_tokens=8)[:, 1:]
    assert float((generated == source.flip(1)).all(dim=1).float().mean()) > 0.8


@pytest.mark.parametrize("mixer", ["full", "retention", {"name": "local", "window": 16}], ids=str)
def test_a_causal_model_learns_to_copy(mixer: Any) -> None:
    model: Any = SubquadForCausalLM(small_config(mixer=mixer))

    def batch() -> dict[str, Tensor]:
        text = words(32)
        tokens = torch.cat((text, torch.full((32, 1), END), text), dim=1)
        return {"input_ids": tokens, "labels": tokens.index_fill(1, torch.arange(9), -100)}

    train(model, batch, steps=400)
    text = words(100)
    prompt = torch.cat((text, torch.full((100, 1), END)), dim=1)
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8)
    assert float((generated[:, 9:] == text).all(dim=1).float().mean()) > 0.8
