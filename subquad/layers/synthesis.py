"""Scores of attention that come from one token alone, from positions alone, or from a query and a key.

A component first makes, for all queries at once, what its scores are made of, (B or 1, H, L, ·); from a slice of that
it then makes the slice's scores (B or 1, H, R, W), of W keys.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.interface import Dims
from subquad.layers.position_scores import (
    HeadLinear,
    Places,
    PositionTable,
    ScoreOptions,
    head_projection,
    head_projections_cost,
)
from subquad.ops.head_split import split_heads
from subquad.ops.precision import wide_dtype
from subquad.ops.softmax import masked_softmax


class Component(nn.Module, ABC):
    """One kind of score."""

    def __init__(self, options: ScoreOptions, dims: Dims) -> None:
        super().__init__()
        self.options = options
        self.dims = dims

    @staticmethod
    @abstractmethod
    def cost(options: ScoreOptions, dims: Dims, length: int, pairs: int, dtype_bytes: int) -> Cost:
        """The price for `pairs` visible pairs of one head."""

    @abstractmethod
    def prepare(self, x: Tensor, places: Places) -> Tensor:
        """What the scores of the tokens x (B, L, D) are made of."""

    @abstractmethod
    def scores(self, made_of: Tensor, k: Tensor) -> Tensor:
        """Scores (B or 1, H, R, W) of a slice of queries and the keys k (B, H, W, ·)."""

    def initialise(self) -> None:
        """Draw the parameters that are no projections."""

    def keys(self, x: Tensor) -> Tensor | None:
        """Keys (B, H, L, E) of the tokens x, for the one component that has keys."""
        return None


class DotProduct(Component):
    """Ordinary attention: a query and a key."""

    def __init__(self, options: ScoreOptions, dims: Dims) -> None:
        super().__init__(options, dims)
        self.project_query, self.project_key = head_projection(dims), head_projection(dims)

    @staticmethod
    def cost(options: ScoreOptions, dims: Dims, length: int, pairs: int, dtype_bytes: int) -> Cost:
        """Two projections, whose results are kept."""
        return head_projections_cost(dims, length, dtype_bytes, count=2) + Cost(flops=2 * pairs * dims.inner_dim)

    def prepare(self, x: Tensor, places: Places) -> Tensor:
        """Queries."""
        return split_heads(self.project_query(x), self.dims.num_heads)

    def keys(self, x: Tensor) -> Tensor:
        """Keys."""
        return split_heads(self.project_key(x), self.dims.num_heads)

    def scores(self, made_of: Tensor, k: Tensor) -> Tensor:
        """Scaled products."""
        return made_of / math.sqrt(self.dims.head_dim) @ k.mT


class Dense(Component):
    """A score for every position, from the query's token alone, by a network of two layers in each head."""

    def __init__(self, options: ScoreOptions, dims: Dims) -> None:
        super().__init__(options, dims)
        self.project_hidden = head_projection(dims)
        self.of_positions = HeadLinear(dims, dims.longest_input)

    @staticmethod
    def cost(options: ScoreOptions, dims: Dims, length: int, pairs: int, dtype_bytes: int) -> Cost:
        """One projection, whose result is kept, and products with a vector for every position."""
        second = Cost(flops=2 * pairs * dims.inner_dim, parameters=HeadLinear.size(dims, dims.longest_input))
        return head_projections_cost(dims, length, dtype_bytes, count=1) + second

    def prepare(self, x: Tensor, places: Places) -> Tensor:
        """The hidden layer."""
        return split_heads(self.project_hidden(x).relu(), self.dims.num_heads)

    def initialise(self) -> None:
        """Draw the outer layer."""
        self.of_positions.initialise()

    def scores(self, made_of: Tensor, k: Tensor) -> Tensor:
        """The outer layer, as far as there are keys."""
        return self.of_positions(made_of, k.shape[2])


class FactorisedDense(Component):
    """As `Dense`, but the scores are products of two short vectors, one stretched and one tiled."""

    def __init__(self, options: ScoreOptions, dims: Dims) -> None:
        super().__init__(options, dims)
        stretched, tiled = options.factors(dims)
        self.project_hidden = head_projection(dims)
        self.stretched, self.tiled = HeadLinear(dims, stretched), HeadLinear(dims, tiled)

    @staticmethod
    def cost(options: ScoreOptions, dims: Dims, length: int, pairs: int, dtype_bytes: int) -> Cost:
        """One projection and the short vectors, all kept."""
        factors = options.factors(dims)
        return head_projections_cost(dims, length, dtype_bytes, count=1) + Cost(
            flops=2 * length * dims.inner_dim * sum(factors),
            activation_bytes=dtype_bytes * length * dims.num_heads * sum(factors),
            parameters=sum(HeadLinear.size(dims, factor) for factor in factors),
        )

    def prepare(self, x: Tensor, places: Places) -> Tensor:
        """The two short vectors."""
        hidden = split_heads(self.project_hidden(x).relu(), self.dims.num_heads)
        return torch.cat((self.stretched(hidden), self.tiled(hidden)), dim=-1)

    def initialise(self) -> None:
        """Draw both outer layers."""
        self.stretched.initialise()
        self.tiled.initialise()

    def scores(self, made_of: Tensor, k: Tensor) -> Tensor:
        """All products, as far as there are keys."""
        stretched, tiled = made_of.split(self.options.factors(self.dims), dim=-1)
        return (stretched[..., :, None] * tiled[..., None, :]).flatten(-2)[..., : k.shape[2]]


class Random(Component):
    """A score for every pair of positions, the same for all inputs."""

    def __init__(self, options: ScoreOptions, dims: Dims) -> None:
        super().__init__(options, dims)
        self.table = PositionTable(options, dims, dims.longest_input, std=1.0)

    @staticmethod
    def cost(options: ScoreOptions, dims: Dims, length: int, pairs: int, dtype_bytes: int) -> Cost:
        """Nothing but the table."""
        return Cost(parameters=PositionTable.size(options, dims, dims.longest_input))

    def initialise(self) -> None:
        """Draw the table."""
        self.table.initialise()

    def prepare(self, x: Tensor, places: Places) -> Tensor:
        """Rows of the table."""
        return places.rows(self.table.values)

    def scores(self, made_of: Tensor, k: Tensor) -> Tensor:
        """As they are."""
        return made_of[..., : k.shape[2]]


class FactorisedRandom(Component):
    """As `Random`, but the table is a product of two narrow ones."""

    def __init__(self, options: ScoreOptions, dims: Dims) -> None:
        super().__init__(options, dims)
        std = options.rank**-0.25  # scores have variance 1
        self.of_queries = PositionTable(options, dims, options.rank, std=std)
        self.of_keys = PositionTable(options, dims, options.rank, std=std, salt=1)

    @staticmethod
    def cost(options: ScoreOptions, dims: Dims, length: int, pairs: int, dtype_bytes: int) -> Cost:
        """The product; both tables together."""
        parameters = 2 * PositionTable.size(options, dims, options.rank)
        return Cost(flops=2 * pairs * dims.num_heads * options.rank, parameters=parameters)

    def initialise(self) -> None:
        """Draw both tables."""
        self.of_queries.initialise()
        self.of_keys.initialise()

    def prepare(self, x: Tensor, places: Places) -> Tensor:
        """Rows of the queries' table."""
        return places.rows(self.of_queries.values)

    def scores(self, made_of: Tensor, k: Tensor) -> Tensor:
        """The product."""
        return made_of @ self.of_keys.values[:, : k.shape[2]].to(made_of.dtype).mT


COMPONENTS: dict[str, type[Component]] = {
    "dense": Dense,
    "random": Random,
    "factorised_dense": FactorisedDense,
    "factorised_random": FactorisedRandom,
    "dot_product": DotProduct,
}
"""The components by the name that an option gives them."""


def attend_slice(
    components: Sequence[Component],
    made_of: Sequence[Tensor],
    weights: Tensor | None,
    visible: Tensor,
    k: Tensor,
    v: Tensor,
) -> Tensor:
    """Softmax attention of a slice of queries.

    Args:
        components: whose scores are added up.
        made_of: what they prepared for these queries, (B or 1, H, R, ·) each.
        weights: (C,), of the components, or None for 1.
        visible: bool, broadcastable to (B, H, R, W).
        k: (B, H, W, ·), the keys of the component that has keys.
        v: (B, H, W, E).

    Returns:
        (B, H, R, E), float32 or wider; 0 for a query that sees no key.
    """
    wide = wide_dtype(v)
    k, v = k.to(wide), v.to(wide)
    scores = [part.scores(made.to(wide), k) for part, made in zip(components, made_of, strict=True)]
    if weights is not None:
        scores = [weight * part for weight, part in zip(weights.to(wide), scores, strict=True)]
    return masked_softmax(sum(scores[1:], scores[0]), visible) @ v
