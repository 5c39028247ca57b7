"""A mixer and a feed-forward that do in training whatever makes running them again difficult."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.interface import ChannelMixer, Dims, FeedforwardConfig, Mixed, MixerConfig, Traits
from subquad.layers.heads import HeadMixer, Heads, projection_cost
from subquad.mask import Mask
from subquad.receipt import leave_receipt
from subquad.state import State


@dataclass(frozen=True, kw_only=True)
class RestlessConfig(MixerConfig):
    """Averages the tokens of a bucket; buckets by random directions that are drawn anew at every training call."""

    family: ClassVar[str] = "sparse"

    @property
    def traits(self) -> Traits:
        return Traits(bidirectional=True, padding=True, aux_loss=True)

    def build(self, dims: Dims) -> Restless:
        return Restless(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        return projection_cost(dims, length, dtype_bytes)


class Restless(HeadMixer):
    directions: Tensor
    calls: Tensor
    mean: Tensor

    def __init__(self, config: RestlessConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.register_buffer("directions", torch.randn(dims.head_dim, 4))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(dims.head_dim))

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        assert heads.v is not None
        if self.training:
            self.calls += 1
            self.directions = torch.randn_like(self.directions)
            self.mean.lerp_(heads.q.detach().mean(dim=(0, 1, 2)), 0.5)
        leave_receipt("restless", asked="nothing", ran="restless", reason="a test")
        scores = (heads.q - self.mean) @ self.directions
        buckets = F.one_hot(scores.argmax(dim=-1), 4).to(heads.v.dtype) * scores.softmax(dim=-1)
        if heads.mask.valid is not None:
            buckets = buckets.masked_fill(~heads.mask.valid[:, None, :, None], 0.0)
        return buckets @ (buckets.mT @ heads.v) / heads.v.shape[2], None

    def mix(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, context_mask: Mask | None, state: State | None
    ) -> Mixed:
        mixed = super().mix(x, context, mask, context_mask, state)
        return mixed._replace(aux_loss=0.01 * mixed.y.square().mean().float() if self.training else None)


@dataclass(frozen=True, kw_only=True)
class RoutedConfig(FeedforwardConfig):
    """Each token to the best of three experts, with jitter and a loss over all tokens."""

    hidden_dim: int | None = None
    """Not used."""

    def build(self, embed_dim: int) -> Routed:
        return Routed(embed_dim)

    def cost(self, embed_dim: int, length: int, dtype_bytes: int) -> Cost:
        return Cost()


class Routed(ChannelMixer):
    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.route = nn.Linear(embed_dim, 3)
        self.experts = nn.Parameter(torch.randn(3, embed_dim, embed_dim) / embed_dim)

    def forward(self, x: Tensor, *, mask: Mask | None = None) -> Mixed:
        jittered = x * (0.9 + 0.2 * torch.rand_like(x)) if self.training else x
        weights = self.route(jittered).softmax(dim=-1)
        weight, chosen = weights.max(dim=-1)
        y = weight[..., None] * torch.einsum("bld,blde->ble", x, self.experts[chosen])
        share = F.one_hot(chosen, 3).to(x.dtype).mean(dim=(0, 1))
        loss = 0.1 * (share * weights.mean(dim=(0, 1))).sum().float() if self.training else None
        return Mixed(y, None, loss)
