"""Sparse-MLP: MLP-Mixer whose two MLPs are mixtures of experts, one chosen for every channel, one for every token.

Lou et al. 2021, "Cross-token Modeling with Conditional Computation", arXiv:2109.02008, first titled "Sparse-MLP".

    MoE(z) = Σ_{i among the k largest p_i} p_i MLP_i(z)     p = softmax(W_r z + ε)     MLP(z) = W₂ GELU(W₁ z + b₁) + b₂
    represent="tokens":  u = x + R'(MoE_S(R(LN(x))ᵀ)ᵀ)      y = u + MoE_C(LN(u))
    represent="block":   z = R(x)    u = z + MoE_S(LN(z)ᵀ)ᵀ    y = R'(u + MoE_C(LN(u)))
    represent="none":    u = x + MoE_S(LN(x)ᵀ)ᵀ             y = u + MoE_C(LN(u))
    R: L × D → S₁ × D₁ and R': S₁ × D₁ → L × D, linear along both axes
    ε: in training, from a normal distribution of standard deviation 1 / experts
    aux = λ (variation(importance)² + variation(load)²) / 2 of either MoE, as in V-MoE

MoE_S routes channels, which are vectors along all tokens; MoE_C routes tokens. k probabilities don't add up to 1.

Cost O(L² D): S₁ = 2 max_length, D₁ = D / 2. With represent="none" O(L D (k S + k F)). What R makes is as long for a
short input as for the longest. Never causal: routing looks at all tokens. The raw stream goes in, and y is used as it
is: the block owns norm, residual and channel mixing. Positions are in the weights along tokens: an invalid token takes
no position, and what is missing counts as 0 behind the norm, or, with represent="block", as x = 0.

Departures: there is no official code, and accounts of the paper differ in where R and R' stand: both places are
offered, with norms and residuals as written above. Experts take all that come (dropless) unless capacity_factor is
given; then items of the largest probability take their seats first, or the first items do. In the paper only the last
blocks of a model are sparse. Weights along tokens always have biases, and so have experts; `bias` speaks of R and R'
along channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.interface import Dims, Mixed, MixerConfig, TokenMixer, Traits
from subquad.layers.heads import initialise_projection
from subquad.layers.projection import Projection
from subquad.layers.routed_experts import RoutedExperts, Routing, routed_cost
from subquad.mask import Mask
from subquad.ops.packing import Packing
from subquad.ops.projection import project
from subquad.registry import register
from subquad.state import State


@register("sparse_mlp")
@dataclass(frozen=True, kw_only=True)
class SparseMlpConfig(MixerConfig):
    """Options of Sparse-MLP."""

    family: ClassVar[str] = "conditional"
    placement: ClassVar[Literal["sublayer", "block"]] = "block"
    why_not_rotary: ClassVar[str] = "its weights belong to positions"

    token_experts: int = 8
    """Experts of MoE_S, for channels."""
    token_top_k: int = 1
    """Experts of a channel."""
    token_hidden_dim: int | None = None
    """S, hidden width of an expert along the tokens; None for D / 2, rounded up."""
    experts: int = 8
    """Experts of MoE_C, for tokens."""
    top_k: int = 2
    """Experts of a token."""
    hidden_dim: int | None = None
    """F, hidden width of an expert along the channels; None for four times those."""
    represent: Literal["tokens", "block", "none"] = "tokens"
    """What the two re-represent layers stand around: MoE_S, the whole block, or nothing."""
    represented_length: int | None = None
    """S₁, tokens that R makes; None for twice max_length."""
    represented_dim: int | None = None
    """D₁, channels that R makes; None for D / 2, rounded up."""
    capacity_factor: float | None = None
    """An expert takes this many times an equal share of a group's choices; None for all that come to it (dropless)."""
    priority: Literal["score", "order"] = "score"
    """Who takes the seats first: items with the largest probability, or the first ones."""
    group: Literal["batch", "sequence"] = "batch"
    """Whose items share the capacity and are to be balanced: those of a call, or of each sequence for itself."""
    noise: bool = True
    """Add noise to the logits of both routers in training."""
    balance_weight: float = 0.01
    """λ, weight of the losses."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        self.check_least({"token_experts": 1, "experts": 1, "token_hidden_dim": 1, "hidden_dim": 1})
        self.check_least({"represented_length": 1, "represented_dim": 1, "balance_weight": 0})
        for name, count in (("token_top_k", "token_experts"), ("top_k", "experts")):
            value, most = getattr(self, name), getattr(self, count)
            if not 1 <= value <= most:
                raise ValueError(f"sparse_mlp: {name} must be at least 1 and at most {count}={most}, got {value}")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(f"sparse_mlp: capacity_factor must be above 0, got {self.capacity_factor}")

    @property
    def traits(self) -> Traits:
        """Bidirectional alone, and bound to a maximal length."""
        return Traits(bidirectional=True, padding=True, fixed_length=True, aux_loss=self.balance_weight > 0)

    def inner_shape(self, dims: Dims) -> tuple[int, int]:
        """Tokens and channels that R makes, or those that there are."""
        if self.represent == "none":
            return dims.longest_input, dims.embed_dim
        length = 2 * dims.longest_input if self.represented_length is None else self.represented_length
        return length, -(-dims.embed_dim // 2) if self.represented_dim is None else self.represented_dim

    def shapes(self, dims: Dims) -> tuple[tuple[int, int], tuple[int, int]]:
        """Width and hidden width of the experts of MoE_S, and of MoE_C."""
        length, width = self.inner_shape(dims)
        channels = width if self.represent == "block" else dims.embed_dim
        along_tokens = -(-dims.embed_dim // 2) if self.token_hidden_dim is None else self.token_hidden_dim
        return (length, along_tokens), (channels, 4 * channels if self.hidden_dim is None else self.hidden_dim)

    def routings(self) -> tuple[Routing, Routing]:
        """Of MoE_S and MoE_C."""
        first, second = (
            Routing(
                owner="sparse_mlp",
                experts=count,
                top_k=top_k,
                noise=self.noise,
                capacity_factor=self.capacity_factor,
                priority=self.priority,
                group=self.group,
                balance_weight=self.balance_weight,
            )
            for count, top_k in ((self.token_experts, self.token_top_k), (self.experts, self.top_k))
        )
        return first, second

    def build(self, dims: Dims) -> SparseMlp:
        """The module."""
        return SparseMlp(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Both mixtures and, where there are, both re-represent layers, in training.

        Autograd keeps the input of each norm and of each product.
        """
        (tokens, along_tokens), (channels, hidden) = self.shapes(dims)
        rows, width = self.inner_shape(dims)
        represented, everything = self.represent != "none", self.represent == "block"
        inner = (rows if represented else length) if length else 0  # length of the items of MoE_S
        count = inner if everything else length  # items of MoE_C
        first, second = self.routings()
        items = width if length else 0
        total = routed_cost(first, items, inner, along_tokens, tokens, dtype_bytes)
        total += routed_cost(second, count, channels, hidden, channels, dtype_bytes)
        total += Cost(
            activation_bytes=dtype_bytes * 2 * count * channels + max(4, dtype_bytes) * 4 * count,
            parameters=4 * channels,
        )
        if not represented:
            return total
        products = length * dims.embed_dim * width + items * length * inner
        kept = length * dims.embed_dim + 2 * items * length + items * inner
        along_channels = 2 * dims.embed_dim * width + (dims.embed_dim + width if dims.bias else 0)
        return total + Cost(
            flops=2 * 2 * products,
            activation_bytes=dtype_bytes * kept,
            parameters=along_channels + 2 * dims.longest_input * rows + rows + dims.longest_input,
        )


class Representation(nn.Module):
    """R and R': linear along tokens and along channels, to another shape and back."""

    def __init__(self, dims: Dims, length: int, width: int) -> None:
        super().__init__()
        self.enter_channels = Projection(dims.embed_dim, width, bias=dims.bias)
        self.enter_tokens = Projection(dims.longest_input, length)
        self.leave_tokens = Projection(length, dims.longest_input)
        self.leave_channels = Projection(width, dims.embed_dim, bias=dims.bias)
        for projection in (self.enter_channels, self.enter_tokens, self.leave_tokens, self.leave_channels):
            initialise_projection(projection)

    def enter(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """R, transposed: channels (B, D₁, S₁) of tokens x (B, L, D); invalid ones (valid: bool (B, L)) count as 0."""
        narrow = _keep(self.enter_channels(x), valid)
        weight = self.enter_tokens.weight[:, : x.shape[1]]
        return project(narrow.mT.contiguous(), weight, self.enter_tokens.bias)

    def leave(self, channels: Tensor, length: int) -> Tensor:
        """R': tokens (B, L, D) of channels (B, D₁, S₁)."""
        tokens = project(channels, self.leave_tokens.weight[:length], self.leave_tokens.bias[:length])
        return self.leave_channels(tokens.mT)


class SparseMlp(TokenMixer):
    """Two mixtures of experts, one along each axis."""

    config: SparseMlpConfig

    def __init__(self, config: SparseMlpConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        of_tokens, of_channels = config.shapes(dims)
        first, second = config.routings()
        self.token_norm, self.channel_norm = nn.LayerNorm(of_channels[0]), nn.LayerNorm(of_channels[0])
        self.token_experts = RoutedExperts(first, *of_tokens)
        self.channel_experts = RoutedExperts(second, *of_channels)
        self.representation = None
        if config.represent != "none":
            self.representation = Representation(dims, *config.inner_shape(dims))
        self.dropout = nn.Dropout(dims.dropout)

    def mix(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, context_mask: Mask | None, state: State | None
    ) -> Mixed:
        """Put the valid tokens first, so that they stand where they count; mix along tokens, then along channels."""
        facts = mask or Mask()
        packing = Packing(facts.valid)
        mixed = self._around_block if self.config.represent == "block" else self._around_tokens
        y, losses = mixed(packing.pack(x), packing.valid)
        added = [loss for loss in losses if loss is not None]
        loss = torch.stack(added).sum().float() if added else None
        return Mixed(packing.unpack(y), None, loss)

    def _around_tokens(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
        """Represent the tokens for MoE_S alone, if at all."""
        normed = _keep(self.token_norm(x), valid)
        if self.representation is None:
            first = self.token_experts(normed.mT.contiguous(), _all_or_nothing(valid, x.shape[2]))
            mixed = first.y.mT
        else:
            channels = self.representation.enter(normed, valid)
            first = self.token_experts(channels, _all_or_nothing(valid, channels.shape[1]))
            mixed = self.representation.leave(first.y, x.shape[1])
        u = x + self.dropout(mixed)
        second = self.channel_experts(self.channel_norm(u), valid)
        return u + self.dropout(second.y), [first.loss, second.loss]

    def _around_block(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
        """Represent the tokens for the whole block."""
        assert self.representation is not None
        z = self.representation.enter(x, valid).mT
        first = self.token_experts(self.token_norm(z).mT.contiguous(), _all_or_nothing(valid, z.shape[2]))
        u = z + self.dropout(first.y.mT)
        second = self.channel_experts(self.channel_norm(u), _all_or_nothing(valid, z.shape[1]))
        return self.representation.leave((u + self.dropout(second.y)).mT, x.shape[1]), [first.loss, second.loss]


def _keep(x: Tensor, valid: Tensor | None) -> Tensor:
    """X (B, L, ·) with 0 for invalid tokens."""
    return x if valid is None else x.masked_fill(~valid[..., None], 0.0)


def _all_or_nothing(valid: Tensor | None, count: int) -> Tensor | None:
    """Items that are made of all tokens, bool (B, count): real where any token is."""
    return None if valid is None else valid.any(dim=1, keepdim=True).expand(-1, count)
