"""Axial positions: learned vectors for the rows and for the columns of a grid in place of one for every position.

Kitaev et al. 2020, "Reformer: The Efficient Transformer", arXiv:2001.04451; the grid is that of its official code.

    e(p) = [ A[p // n2], B[p % n2] ]        A: (n1, d1)    B: (n2, d2)    n1 n2 >= positions    d1 + d2 = D

and likewise with more sides, the last one counting fastest. n1 d1 + n2 d2 parameters in place of n1 n2 D.

Dropout takes whole rows and whole columns: in training an example loses all of A[r], or of B[c], at every position of
that row, or of that column.

Departures: training doesn't ask for sequences as long as the grid. Dropout has a rate of its own, 0 by default, beside
that on the channels of the stream. In Hugging Face's code one rate is both, and columns alone drop, taking A[r] along.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AxialGrid(NamedTuple):
    """Sides of the grid, and the channels that each of them describes."""

    shape: tuple[int, ...]
    dims: tuple[int, ...]


def axial_grid(*, places: int, width: int, shape: Sequence[int] | None, dims: Sequence[int] | None) -> AxialGrid:
    """The grid for so many `places` and vectors of `width` channels; what isn't given is derived.

    Raises:
        ValueError: a side or a number of channels below 1, a grid with too few places, or channels that don't sum up.
    """
    for name, given in (("axial_pos_shape", shape), ("axial_pos_embds_dim", dims)):
        if given is not None and (not given or any(type(size) is not int or size < 1 for size in given)):
            raise ValueError(f"SubquadConfig: {name} must be a list of whole numbers of at least 1, got {given}")
    if shape is None:
        side = math.isqrt(places - 1) + 1
        shape = (math.ceil(places / side), side)
    if math.prod(shape) < places:
        raise ValueError(
            f"SubquadConfig: axial_pos_shape={list(shape)} has {math.prod(shape)} places, but there are {places} "
            "positions (max_position_embeddings, and one for the vector of pooling='cls'); enlarge a side"
        )
    if dims is None:
        if width < len(shape):
            raise ValueError(
                f"SubquadConfig: hidden_size={width} is less than a channel for each of {len(shape)} sides"
            )
        dims = [width // len(shape)] * len(shape)
        dims[-1] += width % len(shape)
    if len(dims) != len(shape) or sum(dims) != width:
        raise ValueError(
            f"SubquadConfig: axial_pos_embds_dim must have a number for each side of {list(shape)} and sum up to "
            f"hidden_size={width}, got {list(dims)} with sum {sum(dims)}"
        )
    return AxialGrid(tuple(shape), tuple(dims))


def check_axial_fields(positions: str, shape: Sequence[int] | None, dims: Sequence[int] | None, dropout: float) -> None:
    """Refuse what describes a grid where there is none, and a rate that is none.

    Raises:
        ValueError: naming the field, what was expected and what was got.
    """
    given = {"axial_pos_shape": shape, "axial_pos_embds_dim": dims, "axial_pos_dropout": dropout or None}
    for field, value in given.items():
        if value is not None and positions != "axial":
            raise ValueError(f"SubquadConfig: {field} goes with positions='axial', got positions={positions!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"SubquadConfig: axial_pos_dropout must be in [0, 1), got {dropout}")


class AxialPositions(nn.Module):
    """Vectors of positions from one table for each side of a grid, drawn from N(0, 1).

    Args:
        grid: its sides and channels.
        dropout: rate at which rows of a table are dropped in training, for each example anew.
    """

    def __init__(self, grid: AxialGrid, dropout: float = 0.0) -> None:
        super().__init__()
        self.grid = grid
        self.dropout = dropout
        sizes = zip(grid.shape, grid.dims, strict=True)
        self.tables = nn.ParameterList(nn.Parameter(torch.empty(side, channels)) for side, channels in sizes)
        self.initialise()

    def initialise(self) -> None:
        """Draw the tables anew."""
        for table in self.tables:
            nn.init.normal_(table)

    def forward(self, positions: Tensor) -> Tensor:
        """Positions, int64 (B, L), to vectors (B, L, D)."""
        vectors, rest = [], positions
        for side, table in reversed(list(zip(self.grid.shape, self.tables, strict=True))):
            vectors.append(self._dropped(F.embedding(rest % side, table), rest % side, side))
            rest = rest // side
        return torch.cat(vectors[::-1], dim=-1)

    def _dropped(self, vectors: Tensor, places: Tensor, side: int) -> Tensor:
        """Vectors (B, L, d) of places (B, L) on a side, without those of the places that an example loses."""
        if not (self.training and self.dropout):
            return vectors
        kept = F.dropout(vectors.new_ones(places.shape[0], side), self.dropout)
        return vectors * kept.gather(1, places)[..., None]
