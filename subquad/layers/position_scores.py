"""What scores of positions are made of: tables of positions, and layers that give every position a score."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.interface import Dims
from subquad.layers.heads import initialise_projection
from subquad.layers.projection import Projection


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What there is to choose.

    Attributes:
        rank: width of the factors of factorised random scores.
        factor: numbers in the stretched factor of factorised dense scores; None for about √max_length.
        trainable: whether scores of positions are learned; else they are fixed by `seed` and the layer.
        seed: of fixed scores.
    """

    rank: int
    factor: int | None
    trainable: bool
    seed: int

    def factors(self, dims: Dims) -> tuple[int, int]:
        """Numbers in the stretched and in the tiled factor of factorised dense scores."""
        longest = dims.longest_input
        stretched = math.isqrt(longest - 1) + 1 if self.factor is None else min(self.factor, longest)
        return stretched, -(-longest // stretched)


@dataclass(frozen=True)
class Places:
    """Where the tokens of a call stand.

    Attributes:
        starts: position of the first token: one for all examples, or one for each.
        length: L.
    """

    starts: tuple[int, ...]
    length: int

    def rows(self, table: Tensor) -> Tensor:
        """The rows of a table (H, M, X) that belong to the tokens: (B or 1, H, L, X); the last one beyond its end."""
        if len(self.starts) == 1 and self.starts[0] + self.length <= table.shape[1]:
            return table[None, :, self.starts[0] : self.starts[0] + self.length]
        starts = torch.tensor(self.starts, device=table.device)[:, None]
        positions = (starts + torch.arange(self.length, device=table.device)).clamp_max(table.shape[1] - 1)
        return table[:, positions].transpose(0, 1)


class PositionTable(nn.Module):
    """Numbers that belong to positions, (H, M, X): learned, or fixed by (seed, layer)."""

    values: Tensor

    def __init__(self, options: ScoreOptions, dims: Dims, width: int, *, std: float, salt: int = 0) -> None:
        super().__init__()
        self.std = std
        shape = dims.num_heads, dims.longest_input, width
        if options.trainable:
            self.values = nn.Parameter(torch.empty(shape))
            self.initialise()
        else:
            generator = torch.Generator().manual_seed(options.seed * 1_000_003 + 2 * dims.layer + salt)
            self.register_buffer("values", std * torch.randn(shape, generator=generator))

    @staticmethod
    def size(options: ScoreOptions, dims: Dims, width: int) -> int:
        """Number of parameters."""
        return dims.num_heads * dims.longest_input * width if options.trainable else 0

    def initialise(self) -> None:
        """Draw learned numbers."""
        if isinstance(self.values, nn.Parameter):
            nn.init.normal_(self.values, std=self.std)


class HeadLinear(nn.Module):
    """A linear layer of its own in each head, from E to `width` numbers."""

    def __init__(self, dims: Dims, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dims.num_heads, width, dims.head_dim))
        self.bias = nn.Parameter(torch.empty(dims.num_heads, width)) if dims.bias else None
        self.initialise()

    @staticmethod
    def size(dims: Dims, width: int) -> int:
        """Number of parameters."""
        return dims.num_heads * width * (dims.head_dim + 1 if dims.bias else dims.head_dim)

    def initialise(self) -> None:
        """Results have the scale of the input; biases are 0."""
        nn.init.normal_(self.weight, std=self.weight.shape[2] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor, width: int | None = None) -> Tensor:
        """(B, H, L, E) -> the first `width` numbers, (B, H, L, width)."""
        found = hidden @ self.weight[:, :width].to(hidden.dtype).mT
        return found if self.bias is None else found + self.bias[:, None, :width].to(hidden.dtype)


def head_projection(dims: Dims) -> nn.Linear:
    """From D to H * E."""
    projection = Projection(dims.embed_dim, dims.inner_dim, bias=dims.bias)
    initialise_projection(projection)
    return projection


def head_projections_cost(dims: Dims, length: int, dtype_bytes: int, *, count: int) -> Cost:
    """The price of so many projections into heads, whose results are kept."""
    weights = dims.embed_dim * dims.inner_dim
    return Cost(
        flops=count * 2 * length * weights,
        activation_bytes=count * dtype_bytes * length * dims.inner_dim,
        parameters=count * (weights + (dims.inner_dim if dims.bias else 0)),
    )
