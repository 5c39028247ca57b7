"""Full: dense softmax attention, the baseline that every other mechanism has to beat.

Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, section 3.2.

    y = softmax(q kᵀ / √E) v W_o        causal: keys j <= i

Cost O(L² D) time; memory O(L D) in training too, since no L x L matrix is kept, whatever the mask.

Departures: attention probabilities are never dropped (it would force the L x L matrix); dropout acts on the output.
The state is a cache of keys and values; that of cross-attention holds the projected context.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.cache import KeyValueCache, attend_cached, empty_cache
from subquad.costs import Cost, visible_pairs
from subquad.heads import HeadMixer, Heads, attention_cost, projection_cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.mask import Mask
from subquad.ops.pattern_attention import pattern_attention
from subquad.patterns.bands import Causal, Strided
from subquad.registry import register
from subquad.state import State, state_dataclass

EVERYTHING = Strided(1)
"""The pattern in which every query sees every key."""


@register("full")
@dataclass(frozen=True, kw_only=True)
class FullConfig(MixerConfig):
    """Dense attention has no options."""

    family: ClassVar[str] = "dense"

    @property
    def traits(self) -> Traits:
        """Everything but global tokens, of which all its tokens are."""
        return Traits(
            bidirectional=True,
            causal=True,
            cross=True,
            padding=True,
            segments=True,
            state=True,
            approximates_softmax=True,
        )

    def build(self, dims: Dims) -> Full:
        """The module."""
        return Full(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections and visible pairs; a context is as long as x."""
        pairs = visible_pairs(length, right=0) if dims.causal else visible_pairs(length)
        stored = length if dims.causal or dims.cross else 0
        state = Cost(state_bytes=2 * stored * dims.inner_dim * max(4, dtype_bytes))
        return projection_cost(dims, length, dtype_bytes) + attention_cost(dims, length, pairs, dtype_bytes) + state


@state_dataclass
class ContextCache(State):
    """Projected context of cross-attention.

    Attributes:
        length: int64 (B,), valid query tokens so far.
        filled: bool (B,), whether a context has been stored.
        keys: (B, H, S, E).
        values: (B, H, S, E).
        key_valid: bool (B, S).
        key_segments: int64 (B, S).
        segmented: bool (B,), whether the context came with segments.
    """

    filled: Tensor
    keys: Tensor
    values: Tensor
    key_valid: Tensor
    key_segments: Tensor
    segmented: Tensor


class Full(HeadMixer):
    """Dense softmax attention."""

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """An empty cache."""
        empty = empty_cache(self.dims, batch_size, device, dtype)
        if not self.dims.cross:
            return empty
        nothing = torch.zeros_like(empty.length, dtype=torch.bool)
        key_valid = torch.zeros_like(empty.segments, dtype=torch.bool)
        return ContextCache(empty.length, nothing, empty.keys, empty.values, key_valid, empty.segments, nothing)

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Dispatch to the form that the dims and the state ask for."""
        if self.dims.cross:
            return self._attend_context(heads, state)
        if isinstance(state, KeyValueCache):
            return attend_cached("full", heads, Causal(), state)
        assert heads.k is not None
        assert heads.v is not None
        return _attend_sequence(heads.q, heads.k, heads.v, heads.mask, causal=self.dims.causal), None

    def _attend_context(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        key_mask = heads.key_mask
        k, v, key_valid, key_segments = heads.k, heads.v, key_mask.valid, key_mask.segments
        if isinstance(state, ContextCache):
            state = _store_context(state, heads)
            k, v = state.keys.to(heads.q.dtype), state.values.to(heads.q.dtype)
            key_valid = state.key_valid
            key_segments = state.key_segments if bool(state.segmented.any()) else None
        assert k is not None
        assert v is not None
        if (heads.mask.segments is None) != (key_segments is None):
            raise ValueError("full: segments of queries and context go together; give both masks segments, or neither")
        if key_segments is None:
            return _attend_everything(heads.q, k, v, key_valid), state
        documents = Mask(segments=heads.mask.segments)
        out = pattern_attention(
            heads.q, k, v, EVERYTHING, mask=documents, key_valid=key_valid, key_segments=key_segments
        )
        return out, state


def _attend_sequence(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, causal: bool) -> Tensor:
    facts = Mask(mask.valid, mask.segments)
    if causal:
        if mask.valid is None and mask.segments is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return pattern_attention(q, k, v, Causal(), mask=facts)
    if mask.segments is None:
        return _attend_everything(q, k, v, mask.valid)
    return pattern_attention(q, k, v, EVERYTHING, mask=facts)


def _attend_everything(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None) -> Tensor:
    """Every query sees every valid key: one row of mask serves them all."""
    visible = None if key_valid is None else key_valid[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def _store_context(state: ContextCache, heads: Heads) -> ContextCache:
    filled = bool(state.filled.all())
    if heads.k is None or heads.v is None:
        if not filled:
            raise ValueError("full: the state holds no context yet; pass context (B, S, D) in the first call")
    elif filled and state.filled.numel():
        raise ValueError("full: the state holds a context already; pass context=None, or begin with a new state")
    else:
        key_valid = torch.ones_like(heads.k[:, 0, :, 0], dtype=torch.bool)
        key_segments = torch.zeros_like(key_valid, dtype=torch.int64)
        state = ContextCache(
            state.length,
            torch.ones_like(state.filled),
            heads.k.to(state.keys.dtype),
            heads.v.to(state.values.dtype),
            key_valid if heads.key_mask.valid is None else heads.key_mask.valid,
            key_segments if heads.key_mask.segments is None else heads.key_mask.segments.long(),
            torch.full_like(state.filled, heads.key_mask.segments is not None),
        )
    length, valid = heads.q.shape[2], heads.mask.valid
    return replace(state, length=state.length + (length if valid is None else valid.sum(dim=1)))
