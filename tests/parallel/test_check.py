"""Models that can't be shared out are refused, with the numbers, before any process talks to another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from subquad.models import SubquadConfig, SubquadForCausalLM, SubquadModel
from subquad.parallel.check import blocks_of, check_model, dense_mixers_of, experts_of
from subquad.parallel.grid import Grid


def model(**changes: Any) -> SubquadModel:
    sizes: dict[str, Any] = {
        "vocab_size": 11,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 8,
        "max_position_embeddings": 16,
    }
    with torch.device("meta"):
        return SubquadModel(SubquadConfig(**(sizes | changes)))


REFUSED = [
    (
        {"feedforward": {"name": "switch", "experts": 6}},
        Grid(4, 2),
        "switch: 6 experts can't be shared out evenly among 4 data-parallel processes "
        r"\(world size 8, 2 to a row\); the number of experts must be a multiple of 4",
    ),
    (
        {"feedforward": {"name": "moe", "hidden_dim": 9}, "num_attention_heads": 2},
        Grid(2, 2),
        "moe: hidden_dim=9 can't be shared out evenly among the 2 processes of a row",
    ),
    ({}, Grid(1, 2), "full: 3 heads can't be shared out evenly among the 2 processes of a row"),
    (
        {"feedforward": {"name": "glu", "hidden_dim": 5}, "num_attention_heads": 2},
        Grid(1, 2),
        "glu: 5 hidden channels can't be shared out evenly among the 2 processes of a row",
    ),
    (
        {"mixer": "sparse_transformer", "num_attention_heads": 2},
        Grid(1, 2),
        "sparse_transformer: can't be shared out among the 2 processes of a row, because it isn't known to be a sum",
    ),
    (
        {"mixer": {"name": "streaming", "learned_sink": True}, "causal": True, "num_attention_heads": 2},
        Grid(1, 2),
        "streaming: can't be shared out among the 2 processes of a row with these options, because of sink_score",
    ),
    ({"residual": "reversible"}, Grid(2), "residual='reversible' can't be shared out"),
    (
        {"mixer": {"name": "linformer", "rank": 4, "sharing": "layerwise"}, "pooling": "mean"},
        Grid(2),
        "linformer: .* is shared by layer 0 and layer 1",
    ),
]


@pytest.mark.parametrize(("changes", "grid", "message"), REFUSED, ids=[message[:20] for *_, message in REFUSED])
def test_what_does_not_fit_is_refused(changes: dict[str, Any], grid: Grid, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(model(**changes), grid)


@pytest.mark.parametrize("mixer", ["full", "sparse_transformer", "reformer", "gmlp"])
def test_without_rows_of_several_every_kind_of_mixer_fits(mixer: str) -> None:
    experts = {"name": "switch", "experts": 6}
    whole = model(mixer=mixer, feedforward=None if mixer == "gmlp" else experts)
    check_model(whole, Grid(3))
    assert [len(experts_of(block)) for block in blocks_of(whole)] == [0 if mixer == "gmlp" else 1] * 2


def test_a_model_of_others_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no layers of subquad\.models"):
        check_model(nn.Linear(2, 2), Grid(1))


def test_a_language_model_fits() -> None:
    config = SubquadConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    whole = SubquadForCausalLM(config)
    check_model(whole, Grid(3, 2))
    assert [len(dense_mixers_of(block)) for block in blocks_of(whole)] == [2]
