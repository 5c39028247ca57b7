"""The cache of keys and values: the state of causal attention that may look back at every token.

Valid tokens are stored without gaps, so that a token's column is its position in the stream.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from subquad.heads import Heads
from subquad.interface import Dims
from subquad.mask import Mask, continue_segments, token_positions
from subquad.ops.packing import append, has_gaps, put_back, take, valid_first
from subquad.ops.pattern_attention import pattern_attention
from subquad.patterns.pattern import Pattern
from subquad.state import State, state_dataclass


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


def empty_cache(dims: Dims, batch_size: int, device: torch.device, dtype: torch.dtype) -> KeyValueCache:
    """Nothing seen yet."""
    length = torch.zeros(batch_size, dtype=torch.int64, device=device)
    keys = torch.zeros(batch_size, dims.num_heads, 0, dims.head_dim, device=device, dtype=dtype)
    return KeyValueCache(length, keys, keys.clone(), length.new_zeros(batch_size, 0))


def store_keys(
    owner: str, state: KeyValueCache, k: Tensor, v: Tensor, mask: Mask
) -> tuple[KeyValueCache, Tensor, Tensor]:
    """The longer cache, the column of each token of this call (B, L), and the segment of each (B, L).

    An invalid token is not stored; its column is that of the valid token before it.

    Raises:
        ValueError: segment numbers below the last stored one.
    """
    batch_size, stored, length = k.shape[0], state.keys.shape[2], k.shape[2]
    columns = token_positions(replace(mask, segments=None), batch_size, length, device=k.device, start=state.length)
    segments = continue_segments(owner, _last_segment(state), state.length, mask, length)
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


def attend_cached(owner: str, heads: Heads, pattern: Pattern, state: KeyValueCache) -> tuple[Tensor, KeyValueCache]:
    """Store this call's keys and attend to all stored ones by a causal pattern: the result (B, H, L, E) and the cache.

    The valid queries are put first, so that they follow each other in the stream; being causal, they see no column
    behind the stored ones, and what the invalid ones see is dropped with their output.

    Raises:
        ValueError: segment numbers below the last stored one.
    """
    assert heads.k is not None
    assert heads.v is not None
    cache, _, segments = store_keys(owner, state, heads.k, heads.v, heads.mask)
    valid = heads.mask.valid
    order = valid_first(valid) if valid is not None and has_gaps(valid) else None
    q, k, v = heads.q, cache.keys.to(heads.q.dtype), cache.values.to(heads.q.dtype)
    if order is not None:  # segments must not decrease, among the invalid queries at the end neither
        q, segments = take(q, order), take(segments, order).cummax(dim=1).values
    one_document = bool((cache.segments[:, :1] == _last_segment(cache)[:, None]).all())
    out = pattern_attention(
        q,
        k,
        v,
        pattern,
        mask=None if one_document else Mask(segments=segments),
        key_segments=None if one_document else cache.segments.cummax(dim=1).values,
        query_offset=state.length,
    )
    return (out if order is None else put_back(out, order)), cache


def _last_segment(state: KeyValueCache) -> Tensor:
    if state.segments.shape[1] == 0:
        return torch.zeros_like(state.length)
    return state.segments.gather(1, (state.length - 1).clamp_min(0)[:, None])[:, 0]
