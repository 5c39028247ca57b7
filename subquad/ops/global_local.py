"""Softmax attention with relative positions: every pair of query and key adds a learned score named by an id.

    s_ij = (q_i · k_j + q_i · a_id(i,j) + β_id(i,j)) / √E      o_i = Σ_j visible exp(s_ij) v_j / Σ_j visible exp(s_ij)

The a and β of a head are a table with one row for each id. For a distance δ = j - i the id is min(δ, m) to the right
and m + min(-δ, m) to the left; one further id, the last, names the pairs of two streams, which have no distance.

`global_local_attention` serves a sequence behind a stream of G global tokens: one function for the rows of either.
Scores are made again in the backward pass, so that what is kept is linear in the length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.ops.precision import full_precision, wide_dtype
from subquad.ops.softmax import masked_softmax

SCORE_ELEMENTS = 2**22
"""Scores that are held at a time, over the whole batch and all heads."""


class RelativeTable(NamedTuple):
    """What an id adds to a score, for 2 m + 1 distances and pairs of two streams.

    Attributes:
        vectors: a, (H, 2 m + 2, E).
        biases: β, (H, 2 m + 2).
    """

    vectors: Tensor
    biases: Tensor


def distance_ids(distance: Tensor, max_distance: int) -> Tensor:
    """Ids of the distances j - i, clipped at m: int64, the shape of `distance`."""
    right = distance.clamp(0, max_distance)
    return torch.where(distance >= 0, right, max_distance + (-distance).clamp(0, max_distance))


def relative_attention_by_ids(
    q: Tensor, k: Tensor, v: Tensor, table: RelativeTable, ids: Tensor, visible: Tensor
) -> Tensor:
    """The definition.

    Args:
        q: (B, H, L, E).
        k: (B, H, S, E).
        v: (B, H, S, E).
        table: what each id adds.
        ids: int64 (L, S).
        visible: bool, broadcastable to (B, H, L, S).

    Returns:
        (B, H, L, E); 0 for a query that sees nothing.
    """
    added = torch.einsum("bhle,hlse->bhls", q, table.vectors[:, ids]) + table.biases[:, ids]
    scores = (q @ k.mT + added) / math.sqrt(q.shape[-1])
    return masked_softmax(scores, visible) @ v


def global_local_attention_by_ids(
    q: Tensor, k: Tensor, v: Tensor, table: RelativeTable, key_valid: Tensor, *, num_global: int, radius: int | None
) -> Tensor:
    """The definition of `global_local_attention`, with the whole matrix; arguments and result as there."""
    first = 0 if radius is None else num_global
    i = torch.arange(q.shape[2], device=q.device)[:, None] + first
    j = torch.arange(k.shape[2], device=q.device)
    same = (j < num_global) == (i < num_global)
    ids = torch.where(same, distance_ids(j - i, _max_distance(table)), table.biases.shape[1] - 1)
    near = torch.ones_like(same) if radius is None else (j < num_global) | ((i - j).abs() <= radius)
    return relative_attention_by_ids(q, k, v, table, ids, near & key_valid[:, None, None, :])


def global_local_attention(
    q: Tensor, k: Tensor, v: Tensor, table: RelativeTable, key_valid: Tensor, *, num_global: int, radius: int | None
) -> Tensor:
    """Rows of one of two streams that lie one behind the other, G global tokens and then the others.

    Args:
        q: queries of the global stream, (B, H, G, E), or of the other one, (B, H, S - G, E).
        k: (B, H, S, E), the keys of both.
        v: (B, H, S, E).
        table: relative scores; inside a stream by distance, between the two by the last id.
        key_valid: bool (B, S).
        num_global: G.
        radius: None for the global rows, which see every key; the others see |i - j| <= radius and all global keys.

    Returns:
        (B, H, G or S - G, E), the dtype of q; 0 for a query that sees nothing.
    """
    if not q.numel():
        return q
    with full_precision(q.device):
        if radius is None:
            return _attend_globally(q, k, v, table, key_valid)
        return _attend_nearby(q, k, v, table, key_valid, num_global, min(radius, q.shape[2] - 1))


def block_size(radius: int, length: int) -> int:
    """Queries per block: about a third of the stretch of keys that a block meets, no more than the sequence."""
    return min(max(32, radius + 1), length)


def kept_tokens(length: int, num_global: int, radius: int) -> int:
    """Rows of q, k and v that autograd keeps of `global_local_attention`, for both streams together."""
    count = length - num_global
    if not count:
        return 3 * length
    reach = min(radius, count - 1)
    filled = count + -count % block_size(reach, count)
    return (filled + num_global) + 2 * (filled + 2 * reach + num_global + length)


def _attend_globally(q: Tensor, k: Tensor, v: Tensor, table: RelativeTable, key_valid: Tensor) -> Tensor:
    """Every key for the G first queries, some rows at a time."""
    count, max_distance = q.shape[2], _max_distance(table)
    q = q.clone()  # a view would keep the whole
    j = torch.arange(k.shape[2], device=q.device)
    rows = max(1, SCORE_ELEMENTS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    parts = []
    for part, start in zip(q.split(rows, dim=2), range(0, count, rows), strict=True):
        i = torch.arange(start, start + part.shape[2], device=q.device)[:, None]
        ids = distance_ids(j - i, max_distance).masked_fill(j >= count, table.biases.shape[1] - 1)
        parts.append(_again_in_backward(_attend, part, k, v, *table, ids, key_valid[:, None, None, :]))
    return torch.cat(parts, dim=2)


def _attend_nearby(
    q: Tensor, k: Tensor, v: Tensor, table: RelativeTable, key_valid: Tensor, num_global: int, radius: int
) -> Tensor:
    """Blocks of queries against the global keys and one contiguous stretch of block + 2 radius others."""
    batch, num_heads, length, _ = q.shape
    block = block_size(radius, length)
    global_k, global_v = (tensor[:, :, :num_global].clone() for tensor in (k, v))  # views would keep the whole
    q = F.pad(q, (0, 0, 0, -length % block)).unflatten(2, (-1, block))
    k, v = (_stretches(tensor[:, :, num_global:], block, radius) for tensor in (k, v))
    offset = torch.arange(block + 2 * radius, device=q.device) - torch.arange(block, device=q.device)[:, None] - radius
    ids = F.pad(distance_ids(offset, _max_distance(table)), (num_global, 0), value=table.biases.shape[1] - 1)
    near = (offset.abs() <= radius) & _stretches(key_valid[:, None, num_global:, None], block, radius)[
        :, 0, :, None, :, 0
    ]
    always = key_valid[:, None, None, :num_global].expand(*near.shape[:3], -1)
    visible = torch.cat((always, near), dim=-1)
    blocks = max(1, SCORE_ELEMENTS // max(1, batch * num_heads * ids.numel()))
    groups = zip(*(tensor.split(blocks, dim=2) for tensor in (q, k, v)), visible.split(blocks, dim=1), strict=True)
    parts = [
        _again_in_backward(_attend_blocks, part, near_k, near_v, global_k, global_v, *table, ids, seen)
        for part, near_k, near_v, seen in groups
    ]
    return torch.cat(parts, dim=2).flatten(2, 3)[:, :, :length]


def _attend_blocks(
    q: Tensor,
    near_k: Tensor,
    near_v: Tensor,
    global_k: Tensor,
    global_v: Tensor,
    vectors: Tensor,
    biases: Tensor,
    ids: Tensor,
    visible: Tensor,
) -> Tensor:
    """Queries (B, H, N, block, E) against the global keys and their stretches (B, H, N, stretch, E)."""
    batch, _, blocks, _, _ = q.shape
    everywhere = (tensor[:, :, None].expand(-1, -1, blocks, -1, -1) for tensor in (global_k, global_v))
    k, v = (torch.cat(pair, dim=3) for pair in zip(everywhere, (near_k, near_v), strict=True))
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, k, v))  # (B * N, H, ·, E)
    out = _attend(q, k, v, vectors, biases, ids, visible.flatten(0, 1)[:, None])
    return out.unflatten(0, (batch, blocks)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, vectors: Tensor, biases: Tensor, ids: Tensor, visible: Tensor) -> Tensor:
    """`relative_attention_by_ids` by the fused operator, the relative scores gathered from one product per query."""
    dtype = wide_dtype(q)
    q_wide, k, v, vectors, biases = (tensor.to(dtype) for tensor in (q, k, v, vectors, biases))
    by_id = (q_wide @ vectors.mT + biases[:, None]) / math.sqrt(q.shape[-1])
    added = by_id.gather(-1, ids.expand(*q.shape[:2], -1, -1)).masked_fill(~visible, -math.inf)
    return F.scaled_dot_product_attention(q_wide, k, v, attn_mask=added).to(q.dtype)


def _again_in_backward(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def _stretches(x: Tensor, block: int, radius: int) -> Tensor:
    """Overlapping views: (B, H, L, E) -> (B, H, N, block + 2 radius, E), zeros before the beginning and the end."""
    padded = F.pad(x, (0, 0, radius, radius + -x.shape[2] % block))
    return padded.unfold(2, block + 2 * radius, block).transpose(-1, -2)


def _max_distance(table: RelativeTable) -> int:
    return table.biases.shape[1] // 2 - 1
