"""The price of a mechanism beside that of dense attention and of the feed-forward: arithmetic, nothing is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from subquad.build import check_dims, feedforward_config, make_dims, mixer_config
from subquad.costs import Cost, overtaking_length
from subquad.interface import Dims, MixerConfig
from subquad.records.conventions import DENSE

DTYPE_BYTES = 4
FEEDFORWARD = "mlp"


@dataclass(frozen=True)
class Price:
    """What one layer's mixer costs at a length, for one sequence, in float32.

    Attributes:
        length: tokens.
        embed_dim: width of the layer.
        num_heads: heads of the layer.
        causal: the form.
        cost: of the mechanism.
        dense_cost: of dense attention in the same form.
        cheaper_from: tokens from which the mechanism needs fewer FLOPs than dense attention; None if never.
        overtakes_feedforward: tokens from which it needs as many FLOPs as the feed-forward of 4 times the width; None
            if never.
        dense_overtakes_feedforward: the same of dense attention.
    """

    length: int
    embed_dim: int
    num_heads: int
    causal: bool
    cost: Cost
    dense_cost: Cost
    cheaper_from: int | None
    overtakes_feedforward: int | None
    dense_overtakes_feedforward: int | None

    def document(self) -> dict[str, Any]:
        """The figures, JSON-ready."""
        return asdict(self)


def price_of(config: MixerConfig, *, length: int, embed_dim: int, num_heads: int, causal: bool) -> Price:
    """The price of a mechanism.

    Raises:
        ValueError: a form or sizes that the mechanism doesn't have, or a length below 1.
    """
    if length < 1:
        raise ValueError(f"--length must be at least 1 token, got {length}")
    dims = make_dims(embed_dim=embed_dim, num_heads=num_heads, causal=causal, max_length=length)
    check_dims(config, dims)
    flops, dense_flops = _flops(config, dims), _flops(mixer_config(DENSE), dims)
    feedforward = feedforward_config(FEEDFORWARD)

    def feedforward_flops(tokens: int) -> int:
        return feedforward.cost(embed_dim, tokens, DTYPE_BYTES).flops

    return Price(
        length=length,
        embed_dim=embed_dim,
        num_heads=num_heads,
        causal=causal,
        cost=config.cost(dims, length, DTYPE_BYTES),
        dense_cost=mixer_config(DENSE).cost(dims, length, DTYPE_BYTES),
        cheaper_from=overtaking_length(dense_flops, lambda tokens: flops(tokens) + 1),
        overtakes_feedforward=overtaking_length(flops, feedforward_flops),
        dense_overtakes_feedforward=overtaking_length(dense_flops, feedforward_flops),
    )


def _flops(config: MixerConfig, dims: Dims) -> Callable[[int], int]:
    """FLOPs by length; a mechanism that is bound to a longest input is built for each length anew."""
    return lambda tokens: config.cost(replace(dims, max_length=tokens), tokens, DTYPE_BYTES).flops
