"""Tokens and positions into the stream."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from subquad.mask import Mask, token_positions
from subquad.models.axial import AxialPositions
from subquad.models.configuration import SubquadConfig


def sinusoid(length: int, width: int, *, device: torch.device) -> Tensor:
    """Fixed positions, float32 (length, width): sine in even channels, cosine in odd (arXiv 1706.03762, 3.5)."""
    positions = torch.arange(length, device=device, dtype=torch.float64)[:, None]
    rates = torch.exp(torch.arange(0, width, 2, device=device, dtype=torch.float64) * (-math.log(10_000.0) / width))
    angles = positions * rates
    table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :width]
    return table.float()


class Embedding(nn.Module):
    """Token vectors plus position vectors, behind an optional learned vector for classification.

    In front of all stands the global stream of mixers that have one: learned vectors, which take no position.
    """

    def __init__(self, config: SubquadConfig, *, prepend_cls: bool) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.cls = nn.Parameter(torch.zeros(config.hidden_size)) if prepend_cls else None
        count = config.global_stream()
        self.stream = nn.Parameter(torch.zeros(count, config.hidden_size)) if count else None
        self.longest = config.max_position_embeddings + prepend_cls
        self.positions = self._learned_positions()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, vectors: Tensor, mask: Mask | None) -> Tensor:
        """Add the positions to vectors (B, L, D), the first of which may be `cls`; put the global stream before them.

        Raises:
            ValueError: more tokens than learned or axial positions.
        """
        batch_size, length, width = vectors.shape
        positions = token_positions(mask, batch_size, length, device=vectors.device)
        if self.config.positions == "sinusoidal":
            vectors = vectors + sinusoid(length, width, device=vectors.device).to(vectors.dtype)[positions]
        if self.positions is not None:
            if length > self.longest:
                limit = self.config.max_position_embeddings
                raise ValueError(f"the input has {length} tokens, but max_position_embeddings={limit}; raise it")
            vectors = vectors + self.positions(positions)
        if self.stream is not None:
            vectors = torch.cat((self.stream.expand(batch_size, -1, -1).to(vectors.dtype), vectors), dim=1)
        return self.dropout(vectors)

    def _learned_positions(self) -> nn.Embedding | AxialPositions | None:
        if self.config.positions == "axial":
            return AxialPositions(self.config.axial_grid(self.longest))
        return nn.Embedding(self.longest, self.config.hidden_size) if self.config.positions == "learned" else None

    def prepend_cls(self, vectors: Tensor) -> Tensor:
        """(B, L, D) -> (B, L + 1, D), the learned vector in front, if there is one."""
        if self.cls is None:
            return vectors
        return torch.cat((self.cls.expand(vectors.shape[0], 1, -1).to(vectors.dtype), vectors), dim=1)
