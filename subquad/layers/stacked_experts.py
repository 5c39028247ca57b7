"""The experts of a layer as one module: their parameters stacked, their products computed one after the other.

It stands by itself, so that another module with the same parameters can stand in its place and compute them on several
processes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from subquad.ops.experts.grouped import ACTIVATIONS, ExpertWeights, experts
from subquad.ops.experts.routing import ExpertRows


class StackedExperts(nn.Module):
    """X feed-forward networks D -> F -> D.

    Args:
        count: X.
        embed_dim: D.
        hidden_dim: F.
        activation: σ, between the layers.
        dropout: rate after the activation, in training.
    """

    def __init__(
        self, count: int, embed_dim: int, hidden_dim: int, *, activation: Literal["gelu", "relu"], dropout: float
    ) -> None:
        super().__init__()
        self.activation: Literal["gelu", "relu"] = activation
        self.dropout = dropout
        self.expand = nn.Parameter(torch.empty(count, hidden_dim, embed_dim))
        self.expand_bias = nn.Parameter(torch.empty(count, hidden_dim))
        self.contract = nn.Parameter(torch.empty(count, embed_dim, hidden_dim))
        self.contract_bias = nn.Parameter(torch.empty(count, embed_dim))

    def forward(self, x: Tensor, gates: Tensor, rows: ExpertRows) -> Tensor:
        """Tokens x through the experts of their `rows`, times their gates.

        Args:
            x: (N, W), W at most D: what is missing of a token counts as 0, and isn't computed.
            gates: (N, k).
            rows: which token goes where.

        Returns:
            (N, W), the dtype of x.
        """
        width = x.shape[1]
        weights = ExpertWeights(
            self.expand[:, :, :width], self.expand_bias, self.contract[:, :width], self.contract_bias[:, :width]
        )
        dropout = self.dropout if self.training else 0.0
        return experts(x, gates, weights, rows, ACTIVATIONS[self.activation], dropout)

    def extra_repr(self) -> str:
        """The sizes, for `print(module)`."""
        count, hidden, width = self.expand.shape
        return f"{count} experts, {width} -> {hidden} -> {width}, {self.activation}, dropout={self.dropout}"
