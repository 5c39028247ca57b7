"""MLP: the position-wise feed-forward network of the Transformer.

Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, section 3.3.

    y = W₂ σ(W₁ x + b₁) + b₂        W₁: D → F, W₂: F → D

Cost 4 L D F FLOPs; F = 4 D unless given.

Departures: the activation is GELU by default, as in Long Range Arena, where the paper has ReLU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from subquad.costs import Cost
from subquad.interface import ChannelMixer, FeedforwardConfig, Mixed
from subquad.layers.projection import Projection
from subquad.mask import Mask
from subquad.parting import Parting
from subquad.registry import register


@register("mlp")
@dataclass(frozen=True, kw_only=True)
class MlpConfig(FeedforwardConfig):
    """Options of the position-wise feed-forward network."""

    hidden_dim: int | None = None
    """F, width of the hidden layer; None for 4 D."""
    activation: Literal["gelu", "relu"] = "gelu"
    """σ."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        self.check_least({"hidden_dim": 1})
        if not 0 <= self.dropout < 1:
            raise ValueError(f"mlp: dropout must be in [0, 1), got {self.dropout}")

    @property
    def position_wise(self) -> bool:
        """Tokens don't meet."""
        return True

    def width(self, embed_dim: int) -> int:
        """F."""
        return 4 * embed_dim if self.hidden_dim is None else self.hidden_dim

    def build(self, embed_dim: int) -> Mlp:
        """The module."""
        return Mlp(self, embed_dim)

    def cost(self, embed_dim: int, length: int, dtype_bytes: int) -> Cost:
        """Autograd keeps x, the hidden layer before and after the activation (ReLU: after it alone)."""
        hidden = self.width(embed_dim)
        kept = 1 if self.activation == "relu" else 2
        return Cost(
            flops=2 * 2 * length * embed_dim * hidden,
            activation_bytes=dtype_bytes * length * (embed_dim + kept * hidden),
            parameters=2 * embed_dim * hidden + hidden + embed_dim,
        )


class Mlp(ChannelMixer):
    """Two linear layers with an activation between them; each token by itself."""

    parting = Parting(("expand",), ("contract",), between=("hidden_dropout",))

    def __init__(self, config: MlpConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.expand = Projection(embed_dim, config.width(embed_dim))
        self.activation = nn.GELU() if config.activation == "gelu" else nn.ReLU()
        self.hidden_dropout = nn.Dropout(config.dropout)
        self.contract = Projection(config.width(embed_dim), embed_dim)
        self.dropout = nn.Dropout(config.dropout)
        for layer in (self.expand, self.contract):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, *, mask: Mask | None = None) -> Mixed:
        """Transform each token of x (B, L, D); the mask is not needed, since tokens don't meet."""
        return Mixed(self.dropout(self.contract(self.hidden_dropout(self.activation(self.expand(x))))))
