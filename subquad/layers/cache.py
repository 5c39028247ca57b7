"""The caches of keys and values: the states of attention that may look at every token.

Causal attention stores its valid tokens without gaps, so that a token's column is its position in the stream;
cross-attention keeps the projected context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.interface import Dims
from subquad.layers.heads import Heads
from subquad.mask import Mask, continue_segments, token_positions
from subquad.ops.packing import Packing, append
from subquad.ops.pattern.attention import pattern_attention
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
    capacity = stored + length if mask.valid is None else max([stored, *new_length.tolist()])
    targets = columns if mask.valid is None else columns.masked_fill(~mask.valid, capacity)
    cache = KeyValueCache(
        new_length,
        append(state.keys, k.to(state.keys.dtype), targets, capacity),
        append(state.values, v.to(state.values.dtype), targets, capacity),
        append(state.segments, segments, targets, capacity),
    )
    return cache, columns, segments


class Stored(NamedTuple):
    """What the queries of a call meet, in the order in which they follow each other in the stream.

    Attributes:
        q: (B, H, L, E).
        k: (B, H, T, E), all stored keys.
        v: (B, H, T, E).
        segments: int64 (B, L); None where all that is stored is one document.
        key_segments: int64 (B, T), likewise.
        offset: int64 (B,), position of the first query.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    segments: Tensor | None
    key_segments: Tensor | None
    offset: Tensor


def attend_stored(
    owner: str, heads: Heads, state: KeyValueCache, attend: Callable[[Stored], Tensor]
) -> tuple[Tensor, KeyValueCache]:
    """Store this call's keys and attend to all stored ones, causally: the result (B, H, L, E) and the cache.

    The valid queries are put first, so that they follow each other in the stream; being causal, they see no column
    behind the stored ones, and what the invalid ones see is dropped with their output.

    Raises:
        ValueError: segment numbers below the last stored one.
    """
    k, v = heads.keys_and_values()
    cache, _, segments = store_keys(owner, state, k, v, heads.mask)
    packing = Packing(heads.mask.valid)
    q, k, v = packing.pack(heads.q), cache.keys.to(heads.q.dtype), cache.values.to(heads.q.dtype)
    one_document = bool((cache.segments[:, :1] == _last_segment(cache)[:, None]).all())
    documents = None, None
    if not one_document:  # they must not decrease, among invalid tokens at the end neither
        documents = packing.pack(segments).cummax(dim=1).values, cache.segments.cummax(dim=1).values
    out = attend(Stored(q, k, v, *documents, state.length))
    return packing.unpack(out), cache


def attend_cached(owner: str, heads: Heads, pattern: Pattern, state: KeyValueCache) -> tuple[Tensor, KeyValueCache]:
    """`attend_stored` by a causal pattern."""
    return attend_stored(owner, heads, state, partial(_attend_pattern, pattern))


def _attend_pattern(pattern: Pattern, stored: Stored) -> Tensor:
    return pattern_attention(
        stored.q,
        stored.k,
        stored.v,
        pattern,
        mask=None if stored.segments is None else Mask(segments=stored.segments),
        key_segments=stored.key_segments,
        query_offset=stored.offset,
    )


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


def empty_context(dims: Dims, batch_size: int, device: torch.device, dtype: torch.dtype) -> ContextCache:
    """No context yet."""
    empty = empty_cache(dims, batch_size, device, dtype)
    nothing = torch.zeros_like(empty.length, dtype=torch.bool)
    key_valid = torch.zeros_like(empty.segments, dtype=torch.bool)
    return ContextCache(empty.length, nothing, empty.keys, empty.values, key_valid, empty.segments, nothing)


class Context(NamedTuple):
    """What the queries of cross-attention meet.

    Attributes:
        k: (B, H, S, E).
        v: (B, H, S, E).
        valid: bool (B, S), or None for all.
        segments: int (B, S), or None without documents.
        state: the new state, or None when none was given.
    """

    k: Tensor
    v: Tensor
    valid: Tensor | None
    segments: Tensor | None
    state: ContextCache | None


def read_context(owner: str, heads: Heads, state: State | None) -> Context:
    """The context of this call, or of the state, which keeps it.

    Raises:
        ValueError: no context or two, or segments on one side alone.
    """
    key_mask = heads.key_mask
    k, v, valid, segments, stored = heads.k, heads.v, key_mask.valid, key_mask.segments, None
    if isinstance(state, ContextCache):
        stored = _store_context(owner, state, heads)
        k, v, valid = stored.keys.to(heads.q.dtype), stored.values.to(heads.q.dtype), stored.key_valid
        segments = stored.key_segments if bool(stored.segmented.any()) else None
    assert k is not None
    assert v is not None
    if (heads.mask.segments is None) != (segments is None):
        raise ValueError(f"{owner}: segments of queries and context go together; give both masks segments, or neither")
    return Context(k, v, valid, segments, stored)


def reads_stored_context(owner: str, filled: Tensor, heads: Heads) -> bool:
    """Whether a call goes on with the context that its state holds.

    Args:
        owner: the mixer's name, for the message.
        filled: bool (B,), whether the state holds one.
        heads: of the call; without keys where it brought no context.

    Raises:
        ValueError: no context or two.
    """
    stored = bool(filled.all())
    if heads.k is None and not stored:
        raise ValueError(f"{owner}: the state holds no context yet; pass context (B, S, D) in the first call")
    if heads.k is not None and stored and filled.numel():
        raise ValueError(f"{owner}: the state holds a context already; pass context=None, or begin with a new state")
    return heads.k is None


def _store_context(owner: str, state: ContextCache, heads: Heads) -> ContextCache:
    if not reads_stored_context(owner, state.filled, heads):
        k, v = heads.keys_and_values()
        key_valid = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool)
        key_segments = torch.zeros_like(key_valid, dtype=torch.int64)
        state = ContextCache(
            state.length,
            torch.ones_like(state.filled),
            k.to(state.keys.dtype),
            v.to(state.values.dtype),
            key_valid if heads.key_mask.valid is None else heads.key_mask.valid,
            key_segments if heads.key_mask.segments is None else heads.key_mask.segments.long(),
            torch.full_like(state.filled, heads.key_mask.segments is not None),
        )
    length, valid = heads.q.shape[2], heads.mask.valid
    return replace(state, length=state.length + (length if valid is None else valid.sum(dim=1)))


def _last_segment(state: KeyValueCache) -> Tensor:
    if state.segments.shape[1] == 0:
        return torch.zeros_like(state.length)
    return state.segments.gather(1, (state.length - 1).clamp_min(0)[:, None])[:, 0]
