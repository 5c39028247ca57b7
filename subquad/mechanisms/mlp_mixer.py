"""MLP-Mixer: one MLP along the tokens of every channel, then one along the channels of every token.

Tolstikhin et al. 2021, "MLP-Mixer: An all-MLP Architecture for Vision", arXiv:2105.01601.

    u = x + MLP_S(LN(x)ᵀ)ᵀ      y = u + MLP_C(LN(u))      MLP(z) = W₂ GELU(W₁ z + b₁) + b₂
    MLP_S: L → S → L, shared by all channels;  MLP_C: D → F → D, shared by all tokens

Cost O(L D (S + F)). Never causal: a hidden unit of MLP_S mixes all positions. The raw stream goes in, and y is used as
it is: the block owns norm, residual and channel mixing. Positions are in MLP_S: shorter input takes the first columns
of its W₁ and the first rows of its W₂, and an invalid token takes no position.

Departures: the paper knows neither padding nor shorter images; here what is missing counts as LN(x) = 0. S is D / 2
unless given, as in all but the smallest of the paper's models. MLP_S always has its biases, one a token; `bias` speaks
of MLP_C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.interface import Dims, Mixed, MixerConfig, TokenMixer, Traits
from subquad.layers.heads import initialise_projection
from subquad.layers.projection import Projection
from subquad.mask import Mask
from subquad.ops.packing import Packing
from subquad.ops.projection import project
from subquad.registry import register
from subquad.state import State


@register("mlp_mixer")
@dataclass(frozen=True, kw_only=True)
class MlpMixerConfig(MixerConfig):
    """Options of MLP-Mixer."""

    family: ClassVar[str] = "attention-free"
    placement: ClassVar[Literal["sublayer", "block"]] = "block"
    why_not_rotary: ClassVar[str] = "its weights belong to positions"

    token_hidden_dim: int | None = None
    """S, hidden width along the tokens; None for D / 2, rounded up."""
    hidden_dim: int | None = None
    """F, hidden width along the channels; None for 4 D."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        self.check_least({"token_hidden_dim": 1, "hidden_dim": 1})

    @property
    def traits(self) -> Traits:
        """Bidirectional alone, and bound to a maximal length."""
        return Traits(bidirectional=True, padding=True, fixed_length=True)

    def widths(self, dims: Dims) -> tuple[int, int]:
        """S and F."""
        along_tokens = -(-dims.embed_dim // 2) if self.token_hidden_dim is None else self.token_hidden_dim
        return along_tokens, 4 * dims.embed_dim if self.hidden_dim is None else self.hidden_dim

    def build(self, dims: Dims) -> MlpMixer:
        """The module."""
        return MlpMixer(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Four products. Autograd keeps the input of each norm and MLP, and hidden layers before and after GELU."""
        width, (along_tokens, hidden) = dims.embed_dim, self.widths(dims)
        kept = 4 * length * width + 2 * (width * along_tokens if length else 0) + 2 * length * hidden
        biases = hidden + width if dims.bias else 0
        return Cost(
            flops=2 * 2 * length * width * (along_tokens + hidden),
            activation_bytes=dtype_bytes * kept + max(4, dtype_bytes) * 4 * length,
            parameters=2 * width * hidden
            + biases
            + 4 * width
            + 2 * dims.longest_input * along_tokens
            + along_tokens
            + dims.longest_input,
        )


class MlpMixer(TokenMixer):
    """Two MLPs, one along each axis."""

    config: MlpMixerConfig

    def __init__(self, config: MlpMixerConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        along_tokens, hidden = config.widths(dims)
        self.token_norm, self.channel_norm = nn.LayerNorm(dims.embed_dim), nn.LayerNorm(dims.embed_dim)
        self.gather_tokens = Projection(dims.longest_input, along_tokens)
        self.spread_tokens = Projection(along_tokens, dims.longest_input)
        self.expand = Projection(dims.embed_dim, hidden, bias=dims.bias)
        self.contract = Projection(hidden, dims.embed_dim, bias=dims.bias)
        for projection in (self.gather_tokens, self.spread_tokens, self.expand, self.contract):
            initialise_projection(projection)
        self.dropout = nn.Dropout(dims.dropout)

    def mix(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, context_mask: Mask | None, state: State | None
    ) -> Mixed:
        """Put the valid tokens first, so that they stand where they count; mix along tokens, then along channels."""
        facts = mask or Mask()
        packing = Packing(facts.valid)
        mixed = self._mix_tokens(self.token_norm(packing.pack(x)), packing.valid)
        u = x + self.dropout(packing.unpack(mixed))
        return Mixed(u + self.dropout(self.contract(F.gelu(self.expand(self.channel_norm(u))))))

    def _mix_tokens(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """MLP_S on x (B, L, D), where invalid tokens (bool (B, L)) stand last."""
        length = x.shape[1]
        channels = (x if valid is None else x.masked_fill(~valid[..., None], 0.0)).mT.contiguous()
        gather, spread = self.gather_tokens, self.spread_tokens
        hidden = F.gelu(project(channels, gather.weight[:, :length], gather.bias))
        return project(hidden, spread.weight[:length], spread.bias[:length]).mT
