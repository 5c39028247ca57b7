"""Numbers that belong to pairs of positions and are added to the logarithms of weights, made for a few pairs at a time.

factorised      w_ij = r_i · c_j
kernel          w_ij = κ_(j - i + ⌊K / 2⌋) along a sequence; on a grid, of the distances in rows and in columns
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.means.strip_geometry import Strips
from subquad.ops.stacked_products import add_stacked_product_, stacked_product


class PositionBias(Protocol):
    """A bias; i counts the queries of a call and j its columns, which queries are the last of.

    Numbers that are the same for several strips stand there once: ⟨N⟩ is N or 1.
    """

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of."""
        ...

    def of(self, *tensors: Tensor) -> PositionBias:
        """The same made of other tensors."""
        ...

    def scores(self, strips: Strips, *, columns_first: bool = False) -> Tensor:
        """(B or 1, G or 1, ⟨N⟩, R, W) for the pairs of these strips.

        With `columns_first` the numbers of a column lie beside each other in memory, not those of a query.
        """
        ...

    def add_gradients(self, gradients: tuple[Tensor, ...], of_scores: Tensor, strips: Strips) -> None:
        """Add to the gradients of the tensors what those of `scores` bring."""
        ...


@dataclass(frozen=True)
class FactorisedBias:
    """Products of short vectors, the same in all groups.

    Attributes:
        rows: (B or 1, L, F), of the queries.
        columns: (B or 1, S, F).
    """

    rows: Tensor
    columns: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Both factors."""
        return self.rows, self.columns

    def of(self, *tensors: Tensor) -> FactorisedBias:
        """Of other factors."""
        return FactorisedBias(*tensors)

    def scores(self, strips: Strips, *, columns_first: bool = False) -> Tensor:
        """(B or 1, 1, N, R, W)."""
        of_rows, of_columns = strips.of_queries(self.rows[:, None]), strips.of_columns(self.columns[:, None])
        if columns_first:
            return stacked_product(of_columns, of_rows.mT).mT
        return stacked_product(of_rows, of_columns.mT)

    def add_gradients(self, gradients: tuple[Tensor, ...], of_scores: Tensor, strips: Strips) -> None:
        """Two products, the second strip by strip: strips share columns."""
        of_rows, of_columns = (x[:, None] for x in gradients)
        add_stacked_product_(strips.of_queries(of_rows), of_scores, strips.of_columns(self.columns[:, None]))
        for i, strip in enumerate(strips.singles()):
            rows = self.rows[:, None, strip.queries]
            add_stacked_product_(of_columns[:, :, strip.columns], of_scores[:, :, i].mT, rows)


@dataclass(frozen=True)
class KernelBias:
    """A kernel in each group, over distances; 0 beyond it.

    Attributes:
        kernels: (G, K) along a sequence, (G, K * K) on a grid, row by row.
        left: columns before a query that the kernel reaches, at most: half of it, causal: K - 1.
        width: of the grid, whose rows follow each other; None for a sequence.
    """

    kernels: Tensor
    left: int
    width: int | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The kernels."""
        return (self.kernels,)

    def of(self, *tensors: Tensor) -> KernelBias:
        """Of other kernels."""
        (kernels,) = tensors
        return KernelBias(kernels, self.left, self.width)

    def scores(self, strips: Strips, *, columns_first: bool = False) -> Tensor:
        """(1, G, ⟨N⟩, R, W)."""
        padded, places = F.pad(self.kernels, (0, 1))[None], self._places(strips)
        return padded[:, :, places.mT].mT if columns_first else padded[:, :, places]

    def add_gradients(self, gradients: tuple[Tensor, ...], of_scores: Tensor, strips: Strips) -> None:
        """Sums over all pairs of one distance."""
        places = self._places(strips).flatten().expand(self.kernels.shape[0], -1)
        padded = F.pad(torch.zeros_like(self.kernels), (0, 1))
        gradients[0].add_(padded.scatter_add_(1, places, of_scores[0].flatten(1))[:, :-1])

    def _places(self, strips: Strips) -> Tensor:
        """Which number of the kernel a pair takes, int64 (⟨N⟩, R, W); the last one more for a pair beyond it."""
        device, size = self.kernels.device, self.kernels.shape[1]
        strips = strips.single(0) if self.width is None else strips
        start = strips.rows * torch.arange(len(strips.numbers), device=device)[:, None, None]
        i = start + torch.arange(strips.rows, device=device)[:, None] + strips.queries.start + strips.offset
        j = start + torch.arange(strips.width, device=device) + strips.columns.start
        if self.width is None:
            place = j - i + self.left
            return place.masked_fill((place < 0) | (place >= size), size)
        side = round(size**0.5)
        down, across = j // self.width - i // self.width + self.left, j % self.width - i % self.width + self.left
        outside = (down < 0) | (down >= side) | (across < 0) | (across >= side)
        return (down * side + across).masked_fill(outside, size)
