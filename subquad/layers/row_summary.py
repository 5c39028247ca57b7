"""Keys of the rows of Combiner's rowmajor plan, projected from averages; Ren et al. 2021, arXiv:2107.05768."""

from __future__ import annotations

from torch import Tensor, nn

from subquad.interface import Dims
from subquad.layers.heads import initialise_projection
from subquad.layers.projection import Projection


class RowSummary(nn.Module):
    """Averages of rows to keys: W₂ LayerNorm(x + W₁ average)."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.project_average = Projection(dims.inner_dim, dims.embed_dim, bias=dims.bias)
        self.norm = nn.LayerNorm(dims.embed_dim)
        self.project_key = Projection(dims.embed_dim, dims.inner_dim, bias=dims.bias)
        self.dropout = nn.Dropout(dims.dropout)
        for projection in (self.project_average, self.project_key):
            initialise_projection(projection)

    def forward(self, x: Tensor, average: Tensor) -> Tensor:
        """(B, L, D) and (B, L, H * E) -> (B, L, H * E)."""
        return self.project_key(self.norm(x + self.dropout(self.project_average(average))))
