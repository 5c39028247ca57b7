"""GLU: a feed-forward network whose hidden layer is multiplied by a gate.

Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202.

    y = W₂ (σ(W x + b) ⊙ (V x + c)) + b₂        W, V: D → F, W₂: F → D

σ names the variant: SiLU SwiGLU, GELU GEGLU, ReLU ReGLU, sigmoid GLU, the identity the bilinear layer.

Cost 6 L D F FLOPs; F = 8 D / 3 unless given, rounded down, so that there are as many weights as in an `mlp` of 4 D.

Departures: the layers have biases, as those of `mlp`; the paper has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.interface import ChannelMixer, FeedforwardConfig, Mixed
from subquad.layers.projection import Projection
from subquad.mask import Mask
from subquad.ops.recomputed import recomputed
from subquad.parting import Parting
from subquad.registry import register


@register("glu")
@dataclass(frozen=True, kw_only=True)
class GluConfig(FeedforwardConfig):
    """Options of the gated feed-forward network."""

    hidden_dim: int | None = None
    """F, width of the hidden layer; None for 8 D / 3."""
    activation: Literal["silu", "gelu", "relu", "sigmoid", "identity"] = "silu"
    """σ, of the gate."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        self.check_least({"hidden_dim": 1})
        if not 0 <= self.dropout < 1:
            raise ValueError(f"glu: dropout must be in [0, 1), got {self.dropout}")

    @property
    def position_wise(self) -> bool:
        """Tokens don't meet."""
        return True

    def width(self, embed_dim: int) -> int:
        """F."""
        return 8 * embed_dim // 3 if self.hidden_dim is None else self.hidden_dim

    def build(self, embed_dim: int) -> Glu:
        """The module."""
        return Glu(self, embed_dim)

    def cost(self, embed_dim: int, length: int, dtype_bytes: int) -> Cost:
        """Autograd keeps x, the gate before its activation, what it multiplies, and the product."""
        hidden = self.width(embed_dim)
        return Cost(
            flops=3 * 2 * length * embed_dim * hidden,
            activation_bytes=dtype_bytes * length * (embed_dim + 3 * hidden),
            parameters=3 * embed_dim * hidden + 2 * hidden + embed_dim,
        )


class Glu(ChannelMixer):
    """Two linear layers side by side, their product, and a third; each token by itself."""

    parting = Parting(("gate", "expand"), ("contract",), between=("hidden_dropout",))

    def __init__(self, config: GluConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        hidden = config.width(embed_dim)
        self.gate, self.expand = Projection(embed_dim, hidden), Projection(embed_dim, hidden)
        self.hidden_dropout = nn.Dropout(config.dropout)
        self.contract = Projection(hidden, embed_dim)
        self.dropout = nn.Dropout(config.dropout)
        for layer in (self.gate, self.expand, self.contract):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, *, mask: Mask | None = None) -> Mixed:
        """Transform each token of x (B, L, D); the mask is not needed, since tokens don't meet."""
        hidden = recomputed(_GATED[self.config.activation], self.gate(x), self.expand(x))
        return Mixed(self.dropout(self.contract(self.hidden_dropout(hidden))))


_GATED = {
    "silu": lambda gate, value: F.silu(gate) * value,
    "gelu": lambda gate, value: F.gelu(gate) * value,
    "relu": lambda gate, value: F.relu(gate) * value,
    "sigmoid": lambda gate, value: torch.sigmoid(gate) * value,
    "identity": torch.mul,
}
"""σ(gate) ⊙ value."""
