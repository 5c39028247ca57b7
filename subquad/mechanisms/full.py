"""Full: dense softmax attention, the baseline that every other mechanism has to beat.

Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, section 3.2.

    y = softmax(q kᵀ / √E) v W_o        causal: keys j <= i

Cost O(L² D) time; memory O(L D) in training too, since the fused operator keeps no L x L matrix.

Departures: attention probabilities are never dropped (it would force the L x L matrix); dropout acts on the output.
Padding and packed segments run in slices of queries. The state is a cache of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.costs import Cost, visible_pairs
from subquad.heads import HeadMixer, Heads, projection_cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.mask import Mask, continue_segments, token_positions
from subquad.ops.packing import append
from subquad.ops.softmax import KeySet, sliced_attention
from subquad.registry import register
from subquad.state import State, state_dataclass


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
        """Projections, visible pairs, and the log-sum-exp of every row; a context is as long as x."""
        pairs = visible_pairs(length, right=0) if dims.causal else visible_pairs(length)
        wide_bytes = max(4, dtype_bytes)
        core = Cost(
            flops=2 * 2 * pairs * dims.inner_dim,
            activation_bytes=wide_bytes * dims.num_heads * length,
            state_bytes=2 * length * dims.inner_dim * wide_bytes if dims.causal or dims.cross else 0,
        )
        return projection_cost(dims, length, dtype_bytes) + core


@state_dataclass
class KeyValueCache(State):
    """Keys and values of all valid tokens so far, without gaps.

    Attributes:
        length: int64 (B,).
        keys: (B, H, T, E), T the largest length; columns from a row's length on are zeros.
        values: (B, H, T, E).
        segments: int64 (B, T), segment of each stored token.
    """

    keys: Tensor
    values: Tensor
    segments: Tensor


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
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        shape = (batch_size, self.dims.num_heads, 0, self.dims.head_dim)
        keys = torch.zeros(shape, device=device, dtype=dtype)
        segments = torch.zeros(batch_size, 0, dtype=torch.int64, device=device)
        if self.dims.cross:
            return ContextCache(length, length > 0, keys, keys.clone(), segments > 0, segments, length > 0)
        return KeyValueCache(length, keys, keys.clone(), segments)

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Dispatch to the form that the dims and the state ask for."""
        if self.dims.cross:
            return self._attend_context(heads, state)
        assert heads.k is not None
        assert heads.v is not None
        if state is not None:
            return self._attend_cached(heads, state)
        return _attend_sequence(heads.q, heads.k, heads.v, heads.mask, causal=self.dims.causal), None

    def _attend_context(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        mask, key_mask = heads.mask, heads.key_mask
        k, v, key_valid, key_segments = heads.k, heads.v, key_mask.valid, key_mask.segments
        if isinstance(state, ContextCache):
            state = _store_context(state, heads)
            k, v = state.keys.to(heads.q.dtype), state.values.to(heads.q.dtype)
            key_valid = state.key_valid
            key_segments = state.key_segments if bool(state.segmented.any()) else None
        assert k is not None
        assert v is not None
        if (mask.segments is None) != (key_segments is None):
            raise ValueError("full: segments of queries and context go together; give both masks segments, or neither")
        out = sliced_attention(heads.q, k, v, KeySet(key_valid, mask.segments, key_segments))
        return out, state

    def _attend_cached(self, heads: Heads, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, KeyValueCache)
        assert heads.k is not None
        assert heads.v is not None
        new_state, last_key, segments = _store_keys(state, heads.k, heads.v, heads.mask)
        k, v = new_state.keys.to(heads.q.dtype), new_state.values.to(heads.q.dtype)
        key_segments = None if heads.mask.segments is None and state.keys.shape[2] == 0 else new_state.segments
        keys = KeySet(None, None if key_segments is None else segments, key_segments, last_key)
        return sliced_attention(heads.q, k, v, keys, aligned=heads.mask.valid is None), new_state


def _attend_sequence(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, causal: bool) -> Tensor:
    if mask.valid is None and mask.segments is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    last_key = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1) if causal else None
    keys = KeySet(mask.valid, mask.segments, mask.segments, last_key)
    return sliced_attention(q, k, v, keys, aligned=causal)


def _store_keys(state: KeyValueCache, k: Tensor, v: Tensor, mask: Mask) -> tuple[KeyValueCache, Tensor, Tensor]:
    """The longer cache, the last key that each token of this call may see, and the segment of each of them (B, L)."""
    batch_size, stored, length = k.shape[0], state.keys.shape[2], k.shape[2]
    columns = token_positions(replace(mask, segments=None), batch_size, length, device=k.device, start=state.length)
    segments = continue_segments("full", _last_segment(state), state.length, mask, length)
    new_length = state.length + (length if mask.valid is None else mask.valid.sum(dim=1))
    capacity = stored + length if mask.valid is None else max(stored, int(new_length.max()))
    targets = columns if mask.valid is None else columns.masked_fill(~mask.valid, capacity)
    cache = KeyValueCache(
        new_length,
        append(state.keys, k.to(state.keys.dtype), targets, capacity),
        append(state.values, v.to(state.values.dtype), targets, capacity),
        append(state.segments, segments, targets, capacity),
    )
    return cache, columns, segments


def _last_segment(state: KeyValueCache) -> Tensor:
    if state.segments.shape[1] == 0:
        return torch.zeros_like(state.length)
    return state.segments.gather(1, (state.length - 1).clamp_min(0)[:, None])[:, 0]


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
