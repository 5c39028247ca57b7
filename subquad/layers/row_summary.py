"""Keys of the rows of Combiner's rowmajor plan, projected from averages; Ren et al. 2021, arXiv:2107.05768."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.interface import Dims
from subquad.layers.heads import initialise_projection
from subquad.layers.projection import Projection
from subquad.ops.combiner.stream import Members
from subquad.ops.head_split import split_heads
from subquad.ops.pattern.attention import pattern_attention
from subquad.patterns.blocks import Block

RowAverage = Literal["values", "keys"]
"""What is averaged and projected to keys."""


class RowSummary(nn.Module):
    """Averages of rows of `width` tokens, by the queries of their tokens, to keys: W₂ LayerNorm(x + W₁ average)."""

    def __init__(self, dims: Dims, width: int, average: RowAverage) -> None:
        super().__init__()
        self.causal, self.width, self.average = dims.causal, width, average
        self.project_average = Projection(dims.inner_dim, dims.embed_dim, bias=dims.bias)
        self.norm = nn.LayerNorm(dims.embed_dim)
        self.project_key = Projection(dims.embed_dim, dims.inner_dim, bias=dims.bias)
        self.dropout = nn.Dropout(dims.dropout)
        for projection in (self.project_average, self.project_key):
            initialise_projection(projection)

    def forward(self, x: Tensor, average: Tensor) -> Tensor:
        """(B, L, D) and (B, L, H * E) -> (B, L, H * E)."""
        return self.project_key(self.norm(x + self.dropout(self.project_average(average))))

    def summarise(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, R, E) of each token's row; R is L, or where all rows are seen, L filled up to rows.

        Args:
            x: (B, L, D).
            q: (B, H, L, E).
            k: (B, H, L, E).
            v: (B, H, L, E).
            valid: bool (B, L), or None for all.
        """
        length = q.shape[2]
        missing = 0 if self.causal or not length else -length % min(self.width, length)
        if missing:
            valid = torch.ones_like(x[..., 0], dtype=torch.bool) if valid is None else valid
            valid = F.pad(valid, (0, missing))
            x, q, k, v = (F.pad(tensor, (0, 0, 0, missing)) for tensor in (x, q, k, v))
        if valid is not None:
            q = q.masked_fill(~valid[:, None, :, None], 0.0)
        rows = Block(self.width)
        values = pattern_attention(q, k, v, rows, key_valid=valid)
        average = values if self.average == "values" else pattern_attention(q, k, k, rows, key_valid=valid)
        return self._keys(x, average.to(x.dtype)), values

    def summarise_members(self, members: Members, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same (B, H, R, E) of rows of a stream; `dtype` is that of the inputs."""
        keys, values = members.averages(members.of_asking(members.kept.q))
        average, x = values if self.average == "values" else keys, members.of_asking(members.kept.x)
        return self._keys(x.to(dtype), average.to(dtype)).to(keys.dtype), values

    def _keys(self, x: Tensor, average: Tensor) -> Tensor:
        """(B, L, D) and (B, H, L, E) -> (B, H, L, E)."""
        return split_heads(self(x, average.transpose(1, 2).flatten(2)), average.shape[1])


def row_summary_cost(dims: Dims, length: int, dtype_bytes: int, width: int, average: RowAverage) -> Cost:
    """Averages and their projections; autograd keeps the averages, both sides of the norm, and the keys."""
    inner, embed, averages = dims.inner_dim, dims.embed_dim, 2 if average == "keys" else 1
    full, rest = divmod(length, width)
    sums = max(4, dtype_bytes) * length * (averages * dims.num_heads + 2)
    return Cost(
        flops=2 * 2 * inner * averages * (full * width**2 + rest**2) + 2 * 2 * length * inner * embed,
        activation_bytes=sums + dtype_bytes * length * ((1 + averages) * inner + 2 * embed),
        parameters=2 * inner * embed + 2 * embed + (inner + embed if dims.bias else 0),
    )
