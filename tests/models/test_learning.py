"""The parts work together: small models learn to copy and to reverse what they read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.models import SubquadConfig, SubquadForCausalLM, SubquadForSeq2SeqLM

pytestmark = pytest.mark.slow
PAD, END = 0, 1


def small_config(**changes: Any) -> SubquadConfig:
    sizes = {"vocab_size": 16, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return SubquadConfig(**sizes, intermediate_size=128, max_position_embeddings=64, **changes)


def words(count: int) -> Tensor:
    return torch.randint(2, 16, (count, 8))


def train(model: Any, batch: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def pairs(count: int, *, turned: bool) -> dict[str, Tensor]:
    """Sources of 4 to 8 words, and they again, or from the end, and the end token."""
    lengths = torch.randint(4, 9, (count, 1))
    places = torch.arange(9)
    source = words(count).masked_fill(places[:8] >= lengths, PAD)
    order = lengths - 1 - places if turned else places.expand(count, 9)
    target = torch.nn.functional.pad(source, (0, 1)).gather(1, order.clamp(0, 8))
    target = target.masked_fill(places == lengths, END).masked_fill(places > lengths, -100)
    return {"input_ids": source, "attention_mask": (source != PAD).long(), "labels": target}


NGRAM = {"mixer": "ngram", "encoder_mixer": "full"}
COPY, REVERSE = False, True


@pytest.mark.parametrize(
    ("changes", "turned"),
    [
        ({}, COPY),
        ({}, REVERSE),
        (NGRAM, COPY),
        (NGRAM, REVERSE),
        ({"cross_mixer": "linear"}, REVERSE),
        ({"residual": "reversible"}, REVERSE),
    ],
    ids=str,
)
def test_an_encoder_and_a_decoder_write_over_99_percent_of_sequences_without_a_fault(
    changes: dict[str, Any], turned: bool
) -> None:
    model: Any = SubquadForSeq2SeqLM(small_config(pad_token_id=PAD, eos_token_id=END, **changes))
    train(model, lambda: pairs(32, turned=turned), steps=800)
    asked = pairs(500, turned=turned)
    labels = asked.pop("labels")
    generated = model.generate(**asked, do_sample=False, max_new_tokens=9)[:, 1:]
    right = (generated == labels.masked_fill(labels == -100, PAD)).all(dim=1)
    assert float(right.float().mean()) > 0.99


@pytest.mark.parametrize("mixer", ["full", "retention", {"name": "local", "window": 16}], ids=str)
def test_a_causal_model_learns_to_copy(mixer: Any) -> None:
    model: Any = SubquadForCausalLM(small_config(mixer=mixer))

    def batch() -> dict[str, Tensor]:
        text = words(32)
        tokens = torch.cat((text, torch.full((32, 1), END), text), dim=1)
        return {"input_ids": tokens, "labels": tokens.index_fill(1, torch.arange(9), -100)}

    train(model, batch, steps=600)
    text = words(500)
    prompt = torch.cat((text, torch.full((500, 1), END)), dim=1)
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8)
    assert float((generated[:, 9:] == text).all(dim=1).float().mean()) > 0.99
