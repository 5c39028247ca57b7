"""Models small enough for tests, one for every mechanism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from subquad.benchmark.probe_subject import miniature
from subquad.build import list_mixers, mixer_config
from subquad.models import (
    SubquadConfig,
    SubquadForCausalLM,
    SubquadForSeq2SeqLM,
    SubquadForSequenceClassification,
    SubquadModel,
)
from subquad.models.block import Block
from subquad.models.pretrained import SubquadPreTrainedModel
from subquad.registry import MIXERS as REGISTERED

VOCABULARY = 11


def small(name: str) -> dict[str, Any]:
    """The written form of a mechanism with its sizes shrunk."""
    return miniature(mixer_config(name)).to_dict()


CAUSAL = list_mixers(causal=True)
STATEFUL = list_mixers(causal=True, state=True)
STATELESS = list_mixers(causal=True, state=False)
CROSS = list_mixers(cross=True)
ENCODERS = list_mixers(bidirectional=True)

Model = TypeVar("Model", bound=SubquadPreTrainedModel)

MIXERS: dict[str, Any] = {name: small(name) for name in list_mixers(bidirectional=True)}
MIXERS["a mixed list"] = [small(name) for name in list_mixers(bidirectional=True)]


def feedforwards_beside(mixer: Any) -> list[str | None]:
    """An MLP for every layer, but for those whose mixer owns its channel mixing."""
    layers = mixer if isinstance(mixer, list) else [mixer]
    names = [layer.get("name") if isinstance(layer, dict) else layer for layer in layers]
    owning = {name for name, config_class in REGISTERED.items() if config_class.placement == "block"}
    return [None if name in owning else "mlp" for name in names] or ["mlp"]


def config(**changes: Any) -> SubquadConfig:
    """Three layers of width 16."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_labels": 3,
        "max_position_embeddings": 40,
        "feedforward": feedforwards_beside(changes.get("mixer", "full")),
    }
    return SubquadConfig(**(sizes | changes))


def build(model_class: Callable[[SubquadConfig], Model], **changes: Any) -> Model:
    """A model with random parameters, in evaluation mode; biases and the learned vector are not 0."""
    torch.manual_seed(0)
    model = model_class(config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def classifier(**changes: Any) -> SubquadForSequenceClassification:
    """A classifier."""
    return build(SubquadForSequenceClassification, **changes)


def causal_lm(**changes: Any) -> SubquadForCausalLM:
    """A causal language model in float64."""
    return build(SubquadForCausalLM, **changes).double()


def seq2seq_lm(**changes: Any) -> SubquadForSeq2SeqLM:
    """An encoder-decoder model in float64."""
    return build(SubquadForSeq2SeqLM, **changes).double()


def blocks_of(model: SubquadModel) -> list[Block]:
    """The layers, as what they are."""
    blocks = list(model.blocks)
    assert all(isinstance(block, Block) for block in blocks)
    return [block for block in blocks if isinstance(block, Block)]


def left_padded(length: int = 13, rows: int = 3) -> tuple[Tensor, Tensor]:
    """The same tokens, padded on the left."""
    tokens, attention = batch(length, rows)
    return tokens, attention.flip(1)


def batch(length: int = 13, rows: int = 3) -> tuple[Tensor, Tensor]:
    """Random tokens and a right-padded attention mask."""
    tokens = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    kept = torch.tensor([length, length - 4, 2][:rows])
    return tokens, (torch.arange(length) < kept[:, None]).long()


def target(length: int = 7) -> Tensor:
    """Random tokens for a decoder."""
    return torch.randint(1, 11, (3, length), generator=torch.Generator().manual_seed(2))


def decoder_of(name: str, **changes: Any) -> SubquadForSeq2SeqLM:
    """A decoder of this mixer behind a dense encoder."""
    return seq2seq_lm(
        mixer=small(name), encoder_mixer="full", encoder_feedforward="mlp", num_hidden_layers=2, **changes
    )


def encoder_of(name: str, **changes: Any) -> SubquadForSeq2SeqLM:
    """An encoder of this mixer before a dense decoder, where `changes` say nothing else."""
    return seq2seq_lm(encoder_mixer=small(name), encoder_feedforward=feedforwards_beside(small(name)), **changes)
