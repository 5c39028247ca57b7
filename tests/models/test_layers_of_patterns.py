"""A list of mixers gives each layer a pattern of its own, and two layers see what one after the other sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.models import SubquadConfig, SubquadForCausalLM
from subquad.patterns import Causal, Pattern, Strided, Window

LENGTH = 22


def reads(mixer: list[dict[str, Any]]) -> Tensor:
    """Bool (L, L): whether the logits at i have a gradient by the token vector at j."""
    config = SubquadConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=len(mixer),
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH,
        mixer=mixer,
    )
    x = torch.randn(1, LENGTH, 8, requires_grad=True, dtype=torch.float64)
    logits = SubquadForCausalLM(config).double().eval()(inputs_embeds=x).logits[0]
    gradients = [torch.autograd.grad(row.square().sum(), x, retain_graph=True)[0][0] for row in logits]
    return torch.stack(gradients).ne(0).any(dim=2)


def strided(part: str) -> dict[str, Any]:
    return {"name": "sparse_transformer", "stride": 4, "combine": part}


def longformer(window: int) -> dict[str, Any]:
    return {"name": "longformer", "window": window}


@pytest.mark.parametrize(
    ("mixer", "patterns"),
    [
        ([strided("local"), strided("summary")], [Window(3, 0), Causal() & Strided(4)]),
        ([strided("summary"), strided("local")], [Causal() & Strided(4), Window(3, 0)]),
        ([longformer(2), longformer(5)], [Window(1, 0), Window(4, 0)]),
    ],
    ids=["interleaved", "interleaved the other way round", "windows that grow"],
)
def test_layers_of_a_list_see_their_own_patterns(mixer: list[dict[str, Any]], patterns: list[Pattern]) -> None:
    first, second = (pattern.dense(LENGTH).double() for pattern in patterns)
    assert torch.equal(reads(mixer), second @ first > 0)
    assert torch.equal(reads(mixer[:1]), first > 0)
