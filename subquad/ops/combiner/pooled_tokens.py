"""Tokens pooled to regions in a backward pass, and the way by which their gradients go back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from subquad.ops.combiner.block_products import in_blocks
from subquad.ops.combiner.example import Example
from subquad.ops.combiner.region_pooling import SUM, first_largest


class Pooled:
    """Pooled tokens, and the graph by which their gradient goes back.

    Args:
        pool: tokens (G, padded, E), and a weight (E, E) or None, to regions (G, R, E); differentiable.
        x: the tokens.
        weight: that of their features.
    """

    def __init__(self, pool: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, weight: Tensor | None) -> None:
        self.leaves = [tensor.detach().requires_grad_() for tensor in (x, weight) if tensor is not None]
        with torch.enable_grad():
            self.result = pool(self.leaves[0], self.leaves[1] if weight is not None else None)
        self.value = self.result.detach()

    def backward(self, grad: Tensor, *totals: Tensor | None) -> None:
        """Add the gradients of x and the weight to the totals."""
        if grad.shape[1]:
            for total, found in zip(totals, torch.autograd.grad(self.result, self.leaves, grad), strict=False):
                assert total is not None
                total += found


class Selected:
    """Pooled tokens where each number is one of a token's: of the asking token, or the largest in its block.

    Args:
        example: whose regions are blocks.
        x: tokens (G, padded, E).
    """

    def __init__(self, example: Example, x: Tensor) -> None:
        self.example, self.places = example, None
        if example.plan.asks_tokens:
            self.value = example.layout.pool(x, SUM)
        else:
            self.value, self.places = first_largest(self._blocks(x), 2)

    def _blocks(self, x: Tensor) -> Tensor:
        return in_blocks(x, 0, self.example.layout.regions, self.example.plan.unit(self.example.padded))

    def backward(self, grad: Tensor, total: Tensor, _: Tensor | None) -> None:
        """Add the gradient of x to the total."""
        if self.places is None:
            total[:, : grad.shape[1]].add_(grad)
        else:
            self._blocks(total).scatter_add_(2, self.places[:, :, None], grad[:, :, None])
