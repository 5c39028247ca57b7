"""The way of gradients back through the gate, y = σ(q) ⊙ mean, for all queries or some."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SavedMeans(NamedTuple):
    """What the backward pass knows of the means.

    Attributes:
        level: (B, G, L, E or 1), the logarithms of all weights of a query; where products gave its sums, one over that
            of the weights, relative as they are.
        mean: (B, G, L, E), before the gate.
    """

    level: Tensor
    mean: Tensor

    def of(self, queries: slice) -> SavedMeans:
        """The part of some queries."""
        return SavedMeans(*(x[:, :, queries] for x in self))


class Wanted(NamedTuple):
    """What the gradients of the means of R queries follow from.

    Attributes:
        kept: of them.
        grad: (B, G, R, E), of the means.
        of_weights: (B, G, R, E or 1), grad times mean, summed over the channels that share k.
    """

    kept: SavedMeans
    grad: Tensor
    of_weights: Tensor

    def of(self, queries: slice) -> Wanted:
        """The part of some queries."""
        return Wanted(self.kept.of(queries), self.grad[:, :, queries], self.of_weights[:, :, queries])


class Upstream(NamedTuple):
    """What the backward pass begins with.

    Attributes:
        q: (B, G, L, E).
        grad: (B, G, L, E), of the result.
        kept: of the means, in the dtype that they were summed in.
        real: bool (B, G, L, 1), False for queries that have no key themselves; None where all have.
    """

    q: Tensor
    grad: Tensor
    kept: SavedMeans
    real: Tensor | None

    def of(self, queries: slice) -> Upstream:
        """The part of some queries."""
        real = None if self.real is None else self.real[:, :, queries]
        return Upstream(self.q[:, :, queries], self.grad[:, :, queries], self.kept.of(queries), real)

    def through_gate(self, of_q: Tensor) -> Wanted:
        """Write the gradient of q; those of the means, without those of queries that have no key, are the result."""
        gate = self.q.to(self.kept.mean.dtype).sigmoid()
        grad = self.grad * gate
        of_gate = grad * self.kept.mean
        torch.addcmul(of_gate, of_gate, gate, value=-1, out=of_q)
        of_weights = of_gate.sum_to_size(self.kept.level.shape)
        if self.real is not None:
            grad, of_weights = (x.masked_fill(~self.real, 0.0) for x in (grad, of_weights))
        return Wanted(self.kept, grad, of_weights)
