"""The linear layer of this library."""

from __future__ import annotations

from torch import Tensor, nn

from subquad.ops.projection import project


class Projection(nn.Linear):
    """`torch.nn.Linear`, whose large products run on whichever of torch's CPU libraries is faster."""

    def forward(self, input: Tensor) -> Tensor:
        """X Wᵀ + b: (..., K) to (..., N)."""
        return project(input, self.weight, self.bias)
