"""Explicit Sparse Transformer: softmax attention over the keys with the largest scores of every query.

Zhao et al. 2019, "Explicit Sparse Transformer: Concentrated Attention Through Explicit Selection", arXiv:1912.11637.

    s_ij = q_i · k_j / √E      t_i = the top_k-th largest visible s_ij      y_i = Σ_j s_ij >= t_i softmax(s_ij) v_j W_o

Cost O(L² D) for the scores; the values cost O(L top_k D), and so does the whole backward pass. Memory is linear in L:
scores are made a slice of queries at a time, and an index and a weight are kept for each of the top_k.

Scores are compared after scaling and after every mask, per head. Keys that tie with t_i are kept too, so that more than
top_k may be; where fewer are visible, all are kept. The choice is a constant to the gradient.

Departures: the official code stores all L x L scores. Its share of the length (`fraction` here) counts the padded
length; here it counts the example's valid keys, so that padding changes nothing. A share of the whole length looks at
the future, so that form is not causal, nor does it know documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from subquad.costs import Cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.layers.cache import KeyValueCache, Stored, attend_stored, empty_cache, empty_context, read_context
from subquad.layers.heads import BY_HEADS, HeadMixer, Heads, projection_cost
from subquad.ops.topk.attention import kept_slots, topk_attention
from subquad.registry import register
from subquad.state import State


@register("topk")
@dataclass(frozen=True, kw_only=True)
class TopkConfig(MixerConfig):
    """Options of the Explicit Sparse Transformer."""

    family: ClassVar[str] = "sparse"

    top_k: int = 8
    """Keys that a query keeps; with `fraction`, at least."""
    fraction: int | None = None
    """m: keep one of m keys, S / m of S rounded up; None for top_k at every length."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.top_k < 1:
            raise ValueError(f"topk: top_k counts the keys that a query keeps, at least 1; got {self.top_k}")
        if self.fraction is not None and self.fraction < 1:
            raise ValueError(f"topk: fraction=m keeps one of m keys and must be at least 1, got {self.fraction}")

    @property
    def traits(self) -> Traits:
        """Everything that dense attention can, but a share of the length is neither causal nor knows documents."""
        constant = self.fraction is None
        return Traits(bidirectional=True, causal=constant, cross=True, padding=True, segments=constant, state=True)

    def build(self, dims: Dims) -> Topk:
        """The module."""
        return Topk(self, dims)

    def kept(self, key_length: int) -> int:
        """Keys that a query keeps of so many valid ones."""
        return self.top_k if self.fraction is None else max(self.top_k, -(-key_length // self.fraction))

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Scores of all visible pairs, values of the kept ones.

        Autograd keeps a weight for each kept score (and its index).
        """
        keys, width = dims.key_length(length), max(4, dtype_bytes)
        pairs = length * (length + 1) // 2 if dims.causal else length * keys
        kept = self.kept(keys)
        few = min(kept, keys)
        values = length * few - (few * (few - 1) // 2 if dims.causal else 0)
        stored = keys if dims.causal or dims.cross else 0
        return projection_cost(dims, length, dtype_bytes) + Cost(
            flops=2 * (pairs + values) * dims.inner_dim,
            activation_bytes=width * dims.num_heads * length * kept_slots(kept, keys),
            state_bytes=2 * stored * dims.inner_dim * width,
        )


class Topk(HeadMixer):
    """Attention to the largest scores."""

    parting = BY_HEADS
    config: TopkConfig

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """An empty cache."""
        make = empty_context if self.dims.cross else empty_cache
        return make(self.dims, batch_size, device, dtype)

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Attend to this call's keys, to the stored ones, or to the context."""
        if self.dims.cross:
            context = read_context("topk", heads, state)
            out = self._attend(heads.q, context.k, context.v, context.valid, heads.mask.segments, context.segments)
            return out, context.state
        if isinstance(state, KeyValueCache):
            return attend_stored("topk", heads, state, self._attend_stored)
        k, v = heads.keys_and_values()
        segments = heads.mask.segments
        return self._attend(heads.q, k, v, heads.mask.valid, segments, segments), None

    def _attend_stored(self, stored: Stored) -> Tensor:
        q, k, v, segments, key_segments, offset = stored
        return topk_attention(
            q,
            k,
            v,
            top_k=self.config.top_k,
            causal=True,
            query_offset=offset,
            segments=segments,
            key_segments=key_segments,
        )

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
        segments: Tensor | None,
        key_segments: Tensor | None,
    ) -> Tensor:
        if self.config.fraction is not None and valid is not None and len(valid):  # each example keeps its own number
            examples = zip(q.split(1), k.split(1), v.split(1), valid.split(1), valid.sum(dim=1).tolist(), strict=True)
            parts = [topk_attention(*qkv, valid=own, top_k=self.config.kept(count)) for *qkv, own, count in examples]
            return torch.cat(parts)
        return topk_attention(
            q,
            k,
            v,
            top_k=self.config.kept(k.shape[2]),
            causal=self.dims.causal,
            valid=valid,
            segments=segments,
            key_segments=key_segments,
        )
