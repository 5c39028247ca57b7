"""Queries or keys of regions, made of those of tokens, and the way by which their gradients go back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.ops.combiner.block_products import in_blocks
from subquad.ops.combiner.layout import Example
from subquad.ops.combiner.region_pooling import MAXIMUM, SUM, first_largest
from subquad.ops.combiner.summarize import Options

AddGradients = Callable[[Tensor, Tensor, Tensor | None], object]
"""Of the gradient of the rows (G, R, E), adds those of the tokens and of the weight to their totals."""


class RegionRows(ABC):
    """Rows (G, R, E) of regions, of tokens (G, padded, E) and perhaps a weight (E, E)."""

    @abstractmethod
    def value(self) -> Tensor:
        """The rows."""

    @abstractmethod
    def vjp(self) -> tuple[Tensor, AddGradients]:
        """The rows, and the way of their gradient back."""


@dataclass(frozen=True)
class OwnRows(RegionRows):
    """Of the first R tokens, each of which has a region."""

    x: Tensor
    regions: int

    def value(self) -> Tensor:
        """A view."""
        return self.x[:, : self.regions]

    def vjp(self) -> tuple[Tensor, AddGradients]:
        """Straight back."""
        return self.value(), lambda grad, total, _: total[:, : self.regions].add_(grad)


@dataclass(frozen=True)
class PooledRows(RegionRows):
    """Features of all tokens of a region, pooled."""

    x: Tensor
    weight: Tensor | None
    example: Example
    options: Options

    def value(self) -> Tensor:
        """Without a graph."""
        return self._pool(self.x, self.weight)

    def vjp(self) -> tuple[Tensor, AddGradients]:
        """By autograd."""
        leaves = [tensor.detach().requires_grad_() for tensor in (self.x, self.weight) if tensor is not None]
        with torch.enable_grad():
            result = self._pool(leaves[0], None if self.weight is None else leaves[1])

        def add_gradients(grad: Tensor, *totals: Tensor | None) -> None:
            if grad.shape[1]:
                for total, found in zip(totals, torch.autograd.grad(result, leaves, grad), strict=False):
                    assert total is not None
                    total += found

        return result.detach(), add_gradients

    def _pool(self, x: Tensor, weight: Tensor | None) -> Tensor:
        example, reduce = self.example, self.options.reduce
        if self.options.rectified:
            x = (x if weight is None else x @ weight.T).relu()
        reduction = MAXIMUM if reduce == "max" else SUM
        if example.kept is not None:
            x = x.masked_fill(~example.kept[:, None], reduction.neutral)
        pooled = example.layout.pool(x, reduction)
        if example.sizes is None:
            return pooled if reduction is SUM else pooled.masked_fill(pooled == -torch.inf, 0.0)
        if reduce == "mean":
            pooled = pooled / example.sizes.clamp_min(1)[:, None]
        return pooled.masked_fill((example.sizes == 0)[:, None], 0.0)


@dataclass(frozen=True)
class LargestRows(RegionRows):
    """Elementwise maxima of blocks of `size` tokens, all real: what `PooledRows` is then, with a shorter way back."""

    x: Tensor
    regions: int
    size: int

    def value(self) -> Tensor:
        """Maxima."""
        return self._blocks(self.x).amax(dim=2)

    def vjp(self) -> tuple[Tensor, AddGradients]:
        """To the first token that has the maximum."""
        value, places = first_largest(self._blocks(self.x), 2)
        return value, lambda grad, total, _: self._blocks(total).scatter_add_(2, places[:, :, None], grad[:, :, None])

    def _blocks(self, x: Tensor) -> Tensor:
        return in_blocks(x, 0, self.regions, self.size)
