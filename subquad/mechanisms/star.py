"""Star: satellites that see their neighbours and one relay, which sees everything; T steps make a layer.

Guo et al. 2019, "Star-Transformer", arXiv:1902.09113.

    H⁰ = E      for t = 1..T, with multi-head attention A(query; keys):
    h_i = LN(ReLU(A(h_i; h_{i-1}, h_i, h_{i+1}, e_i, s)))      a ring: the first and the last satellite are neighbours
    s   = LN(ReLU(A(s; s, H)))                                 by the new H: the satellites go first

Cost O(L T D), with five keys for each satellite and L for the relay. The first valid token is the relay's place (the
model's CLS vector); the other valid ones are the satellites, packed, so that padding is nobody's neighbour. A single
satellite has no neighbours. The raw stream goes in, and y, the last s and H, is used as it is: there is no residual and
no feed-forward.

Departures: the relay begins with its token's vector, which carries it from layer to layer; the paper's, the mean of the
satellites, is `start="mean"`. Of the official code (fastNLP), `norm="pre_official"` has LN before the satellites'
queries and ring keys alone and leaky ReLU without LN after it, and `boundary="zero_key"` has zeros as key and value of
a neighbour that doesn't exist, which so takes weight exp(0). There, padding is a neighbour too, and counts in the mean;
only the latter is offered (`start="padded_mean"`; padding then changes the result). Each step has parameters of its
own, as there; `share_steps` ties them. Attention weights are never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subquad.costs import Cost
from subquad.interface import Dims, Mixed, MixerConfig, TokenMixer, Traits
from subquad.layers.heads import initialise_projection
from subquad.layers.projection import Projection
from subquad.mask import Mask
from subquad.ops.head_split import merge_heads, split_heads
from subquad.ops.packing import Packing, take
from subquad.ops.precision import full_precision, wide_dtype
from subquad.registry import register
from subquad.state import State

KEYS = 5
"""Keys of a satellite: three of the ring, its embedding and the relay."""


@register("star")
@dataclass(frozen=True, kw_only=True)
class StarConfig(MixerConfig):
    """Options of the Star-Transformer."""

    family: ClassVar[str] = "sparse"
    placement: ClassVar[Literal["sublayer", "block"]] = "block"
    why_not_rotary: ClassVar[str] = "since the relay has no position"

    steps: int = 2
    """T, rounds of satellites and relay in one layer."""
    boundary: Literal["ring", "zero_key", "mask"] = "ring"
    """The first and the last of several satellites are neighbours; or have a key and value of 0 there, or none."""
    norm: Literal["post", "pre_official"] = "post"
    """ReLU, then LN on satellites and relay; or LN on what the satellites' ring reads, and leaky ReLU."""
    start: Literal["token", "mean", "padded_mean"] = "token"
    """The relay begins with its token's vector, or the satellites' mean, or that with padding counted as zeros."""
    share_steps: bool = False
    """One set of parameters for all steps."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        self.check_least({"steps": 1})

    @property
    def traits(self) -> Traits:
        """Bidirectional alone: the relay sees everything. It is one relay, hence no segments."""
        return Traits(bidirectional=True, padding=True)

    def build(self, dims: Dims) -> Star:
        """The module."""
        return Star(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Per step: the projections of satellites, embeddings and relay, and five keys a satellite, all for the relay.

        Autograd keeps x, the projections, both results, what the activations and the norms need, and the relay's
        log-sum-exp. A neighbour that is masked is computed all the same.
        """
        relay, inner, width = min(length, 1), dims.inner_dim, dims.embed_dim
        satellites, projected = length - relay, 8 * length - 2 * relay
        norms = 2 if self.norm == "post" else 1
        kept = projected * inner + ((4 - norms) * satellites + 2 * relay) * width
        wide = dims.num_heads * relay + 2 * (length if self.norm == "post" else satellites)
        biases = 3 * inner + width if dims.bias else 0
        parameters = 2 * (4 * width * inner + biases) + norms * 2 * width
        return Cost(
            flops=self.steps * 2 * inner * (width * projected + 2 * (KEYS * satellites + length)),
            activation_bytes=dtype_bytes * (self.steps * kept + satellites * width)
            + max(4, dtype_bytes) * self.steps * wide,
            parameters=parameters if self.share_steps else self.steps * parameters,
        )


class Links(NamedTuple):
    """Who is whose neighbour among N satellites, of which the first of each example are real.

    Attributes:
        left: int64 (B, N), the satellite before each.
        right: int64 (B, N), the one after.
        missing: bool (B, 1, N, 5), True for a neighbour that doesn't exist; None where all do.
        missing_score: its score.
        seen_by_relay: bool (B, 1, 1, 1 + N), the relay itself and the real satellites; None for all.
    """

    left: Tensor
    right: Tensor
    missing: Tensor | None
    missing_score: float
    seen_by_relay: Tensor | None


class Attention(nn.Module):
    """The four projections of a multi-head attention."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.num_heads = dims.num_heads
        self.project_query = Projection(dims.embed_dim, dims.inner_dim, bias=dims.bias)
        self.project_key = Projection(dims.embed_dim, dims.inner_dim, bias=dims.bias)
        self.project_value = Projection(dims.embed_dim, dims.inner_dim, bias=dims.bias)
        self.project_out = Projection(dims.inner_dim, dims.embed_dim, bias=dims.bias)
        for projection in (self.project_query, self.project_key, self.project_value, self.project_out):
            initialise_projection(projection)

    def query(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, H, L, E)."""
        return self._split(self.project_query(x))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> (B, H, L, E), twice."""
        return self._split(self.project_key(x)), self._split(self.project_value(x))

    def merge(self, out: Tensor) -> Tensor:
        """(B, H, L, E) -> (B, L, D)."""
        return self.project_out(merge_heads(out))

    def _split(self, x: Tensor) -> Tensor:
        return split_heads(x, self.num_heads)


class Step(nn.Module):
    """One round: the satellites read their neighbours, then the relay reads the satellites."""

    def __init__(self, config: StarConfig, dims: Dims) -> None:
        super().__init__()
        self.of_satellites, self.of_relay = Attention(dims), Attention(dims)
        if config.norm == "post":
            self.read = nn.Identity()
            self.finish_satellites = nn.Sequential(nn.ReLU(), nn.LayerNorm(dims.embed_dim))
            self.finish_relay = nn.Sequential(nn.ReLU(), nn.LayerNorm(dims.embed_dim))
        else:
            self.read = nn.LayerNorm(dims.embed_dim, eps=1e-6)
            self.finish_satellites, self.finish_relay = nn.LeakyReLU(), nn.LeakyReLU()

    def forward(self, satellites: Tensor, relay: Tensor, embeddings: Tensor, links: Links) -> tuple[Tensor, Tensor]:
        """The next satellites (B, N, D) and relay (B, 1, D)."""
        heads, read = self.of_satellites, self.read(satellites)
        near = (heads.query(read), *heads.key_value(read), *heads.key_value(embeddings), *heads.key_value(relay))
        mixed = checkpoint(_attend_near, *near, links, use_reentrant=False, preserve_rng_state=False)
        satellites = self.finish_satellites(heads.merge(mixed))
        heads = self.of_relay
        own, others = heads.key_value(relay), heads.key_value(satellites)
        k, v = (torch.cat(pair, dim=2) for pair in zip(own, others, strict=True))
        mixed = F.scaled_dot_product_attention(heads.query(relay), k, v, attn_mask=links.seen_by_relay)
        return satellites, self.finish_relay(heads.merge(mixed))


class Star(TokenMixer):
    """Satellites around a relay."""

    config: StarConfig

    def __init__(self, config: StarConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.steps = nn.ModuleList(Step(config, dims) for _ in range(1 if config.share_steps else config.steps))
        self.dropout = nn.Dropout(dims.dropout)

    def mix(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, context_mask: Mask | None, state: State | None
    ) -> Mixed:
        """Put relay and satellites in order, run the steps, and put them back."""
        valid = None if mask is None else mask.valid
        packing = Packing(valid)
        tokens = packing.pack(x)
        embeddings = tokens[:, 1:].clone()  # for the projections, which copy what isn't contiguous, each anew
        count = torch.full_like(x[:, 0, 0], x.shape[1], dtype=torch.int64) if valid is None else valid.sum(dim=1)
        count = (count - 1).clamp_min(0)
        links = self._links(count, embeddings, padded=valid is not None)
        satellites, relay = embeddings, self._start(tokens, embeddings, count)
        for index in range(self.config.steps):
            step = self.steps[index % len(self.steps)]
            satellites, relay = step(satellites, relay, embeddings, links)
        y = torch.cat((relay, satellites), dim=1)
        return Mixed(self.dropout(packing.unpack(y)))

    def _start(self, tokens: Tensor, embeddings: Tensor, count: Tensor) -> Tensor:
        """The first relay, (B, 1, D)."""
        if self.config.start == "token":
            return tokens[:, :1].clone()
        total = embeddings.sum(dim=1, keepdim=True)
        if self.config.start == "mean":
            return total / count.clamp_min(1)[:, None, None]
        return total / max(1, embeddings.shape[1])

    def _links(self, count: Tensor, embeddings: Tensor, *, padded: bool) -> Links:
        """The neighbours, where `count` (B,) of the satellites are real."""
        places, ends = torch.arange(embeddings.shape[1], device=count.device), count[:, None]
        seen = None
        if padded:
            seen = F.pad(places < ends, (1, 0), value=True)[:, None, None]
        if self.config.boundary == "ring":
            around, alone, missing = ends.clamp_min(1), ends < 2, None
            if bool(alone.any()):
                missing = F.pad(alone[..., None].expand(-1, len(places), 2), (1, KEYS - 3))[:, None]
            return Links((places - 1) % around, (places + 1) % around, missing, float("-inf"), seen)
        left = (places - 1).clamp_min(0).expand(len(count), -1)
        right = (places + 1).clamp_max(embeddings.shape[1] - 1).expand(len(count), -1)
        missing = torch.stack(
            (torch.zeros_like(places < ends), (places < 1).expand_as(left), places + 1 >= ends), dim=-1
        )
        score = 0.0 if self.config.boundary == "zero_key" else float("-inf")
        return Links(left, right, F.pad(missing, (0, KEYS - 3))[:, None], score, seen)


def _attend_near(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    relay_k: Tensor,
    relay_v: Tensor,
    links: Links,
) -> Tensor:
    """Each satellite's softmax over its five keys, (B, H, N, E); the gathered keys are made again for the backward."""
    with full_precision(q.device):
        wide = wide_dtype(q)
        keys, values = (
            torch.stack((ring, take(ring, links.left), take(ring, links.right), own, relay.expand_as(own)), dim=3)
            for ring, own, relay in ((k, own_k, relay_k), (v, own_v, relay_v))
        )
        scores = torch.einsum("bhne,bhnke->bhnk", q.to(wide), keys.to(wide)) * q.shape[-1] ** -0.5
        if links.missing is None:
            weights = scores.softmax(dim=-1)
        else:
            weights = scores.masked_fill(links.missing, links.missing_score).softmax(dim=-1)
            weights = weights.masked_fill(links.missing, 0.0)
        return torch.einsum("bhnk,bhnke->bhne", weights, values.to(wide)).to(q.dtype)
