"""Softmax attention over the largest scores of every query.

    t_i = the top_k-th largest of the visible scores s_ij = q_i · k_j / √E      o_i = Σ_j s_ij >= t_i softmax(s_ij) v_j

Every score equal to t_i is kept, so that a tie keeps more than top_k; where fewer are visible, all are kept. The choice
is a constant to the gradient, which flows through the kept scores and their values.

All scores have to be computed, but a slice of queries at a time, and only what was kept lives on: four bytes of index
and a weight for each. A query with a tie keeps more than has room there; such queries are computed apart, and again in
the backward pass from the indices alone, as all are when every key is kept, without indices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.choice import chosen
from subquad.ops.onednn import product
from subquad.ops.precision import full_precision, wide_dtype
from subquad.ops.softmax import softmax_attention
from subquad.ops.topk.key_ranges import KeyRanges, hide_, key_ranges
from subquad.ops.topk.largest import largest
from subquad.ops.topk.rows_apart import Part, add_gradients_apart, kept_places, rows_apart, scores_apart, weights_apart
from subquad.ops.topk.sparse_rows import (
    pairs_by_key,
    rows_by_key,
    softmax_,
    softmax_backward,
    weighted_rows,
    weights_gradient,
)

SLICE_PAIRS = 2**22
"""Scores of a slice, of all its heads: few enough for the cache; at least one query runs at a time."""

SLICE_ROWS = 512
"""Queries of a slice: enough to call few operators, and few beside a length that causality halves."""


def topk_attention_by_pairs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    top_k: int,
    causal: bool = False,
    valid: Tensor | None = None,
    query_offset: int | Tensor = 0,
    segments: Tensor | None = None,
    key_segments: Tensor | None = None,
) -> Tensor:
    """The definition, with matrices of L x S. Arguments and result as in `topk_attention`."""
    rows, columns = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    visible = torch.ones(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        offset = torch.as_tensor(query_offset, device=q.device).reshape(-1, 1, 1, 1)
        visible = visible & (columns <= rows + offset)
    if valid is not None:
        visible = visible & valid[:, None, None, :]
    if segments is not None and key_segments is not None:
        visible = visible & (segments[:, None, :, None] == key_segments[:, None, None, :])
    wide = wide_dtype(q)
    scores = q.detach().to(wide) / math.sqrt(q.shape[3]) @ k.detach().to(wide).mT
    scores = scores.masked_fill(~visible, -torch.inf)
    smallest_kept = scores.topk(min(top_k, k.shape[2])).values[..., -1:]
    return softmax_attention(q, k, v, visible & (scores >= smallest_kept))


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    top_k: int,
    causal: bool = False,
    valid: Tensor | None = None,
    query_offset: int | Tensor = 0,
    segments: Tensor | None = None,
    key_segments: Tensor | None = None,
) -> Tensor:
    """Attend to the keys with the largest scores, in memory linear in the length.

    Args:
        q: (B, H, L, E), any strides.
        k: (B, H, S, E).
        v: (B, H, S, Ev).
        top_k: scores that a query keeps, at least 1.
        causal: query i sees the keys at positions up to i + query_offset.
        valid: bool (B, S), True for a real key.
        query_offset: position of the first query, an int or int64 (B,).
        segments: int (B, L), non-decreasing; together with `key_segments`, only equal ones see each other.
        key_segments: int (B, S), non-decreasing.

    Returns:
        (B, H, L, Ev), the dtype of q; 0 for a query that sees no key.

    Raises:
        ValueError: shapes or dtypes that don't fit together.
    """
    _check(q, k, v, top_k, valid, query_offset, segments, key_segments)
    offsets = query_offset.tolist() if isinstance(query_offset, Tensor) else [query_offset]
    one_for_all = valid is None and segments is None and len(set(offsets)) <= 1
    ranges = [
        key_ranges(
            q.shape[2],
            k.shape[2],
            device=q.device,
            causal=causal,
            offset=offsets[min(example, len(offsets) - 1)],
            valid=None if valid is None else valid[example],
            segments=None if segments is None else segments[example],
            key_segments=None if key_segments is None else key_segments[example],
        )
        for example in range(min(1, q.shape[0]) if one_for_all else q.shape[0])
    ]
    attend: Any = _TopkAttention.apply
    if torch.compiler.is_compiling():  # ties decide sizes, and the compiler of torch 2.13 fails on what stands between
        attend = torch.compiler.disable(attend)
    return attend(q, k, v, top_k, ranges)


def kept_slots(top_k: int, key_length: int) -> int:
    """Weights that are kept for every query: none where all keys are, since then the scores are computed again."""
    return top_k if top_k < key_length else 0


class _TopkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, top_k: int, ranges: list[KeyRanges]) -> Tensor:
        (batch, num_heads, length, _), wide = q.shape, wide_dtype(q)
        shape = batch * num_heads, length, kept_slots(top_k, k.shape[2])
        weights = torch.full(shape, -torch.inf, dtype=wide, device=q.device)
        indices = torch.zeros(shape, dtype=torch.int32, device=q.device)
        apart = torch.full(shape[:2], shape[2] == 0, device=q.device)
        out = torch.zeros(*shape[:2], v.shape[3], dtype=q.dtype, device=q.device)
        places: list[Tensor] = []
        with full_precision(q.device):
            for part in _parts(q, k, v, ranges):
                values, columns, tied = weights[part.heads], indices[part.heads], apart[part.heads]
                if shape[2]:
                    _choose(part, top_k, values, columns, tied)
                    softmax_(values).masked_fill_(tied[..., None], 0.0)
                    out[part.heads] = weighted_rows(part.v, columns, values).to(q.dtype)
                for head, rows in rows_apart(part, tied, SLICE_PAIRS):
                    scores, kept = scores_apart(part, head, rows), None
                    if shape[2]:
                        kept = kept_places(scores, top_k)
                        places.append(kept)
                    out[part.heads][head, rows] = (weights_apart(scores, kept) @ part.v[head]).to(q.dtype)
        ctx.save_for_backward(q, k, v, weights, indices, apart, *places)
        ctx.ranges = ranges
        return out.unflatten(0, (batch, num_heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        q, k, v, weights, indices, apart, *places = ctx.saved_tensors
        remaining = iter(places)
        grads = [torch.zeros_like(tensor).flatten(0, 1) for tensor in (q, k, v)]
        with full_precision(q.device):
            for part in _parts(q, k, v, ctx.ranges):
                upstream = grad.flatten(0, 1)[part.heads].to(weights.dtype).contiguous()
                found = _gradients(part, upstream, weights[part.heads], indices[part.heads])
                for head, rows in rows_apart(part, apart[part.heads], SLICE_PAIRS):
                    add_gradients_apart(part, head, rows, next(remaining, None), upstream, found)
                grads[0][part.heads] = (found[0] / math.sqrt(q.shape[3])).to(q.dtype)
                columns = slice(None) if part.ranges.columns is None else part.ranges.columns
                grads[1][part.heads, columns], grads[2][part.heads, columns] = (
                    found[1].to(q.dtype),
                    found[2].to(q.dtype),
                )
        return *(tensor.unflatten(0, q.shape[:2]) for tensor in grads), None, None


def _parts(q: Tensor, k: Tensor, v: Tensor, ranges: list[KeyRanges]) -> Iterator[Part]:
    """Heads in groups whose scores fit into a slice, or one by one; without those that have no key."""
    wide, scale = wide_dtype(q), 1 / math.sqrt(q.shape[3])
    flat_q, flat_k, flat_v = (tensor.flatten(0, 1) for tensor in (q, k, v))
    per_range = flat_q.shape[0] // max(1, len(ranges))
    for index, seen in enumerate(ranges):
        size = max(1, min(per_range, SLICE_PAIRS // max(1, q.shape[2] * seen.width)))
        for start in range(index * per_range, (index + 1) * per_range, size) if seen.width else ():
            heads = slice(start, min(start + size, (index + 1) * per_range))
            keys = (tensor[heads] for tensor in (flat_k, flat_v))
            if seen.columns is not None:
                keys = (tensor[:, seen.columns] for tensor in keys)
            part_k, part_v = (tensor.to(wide).contiguous() for tensor in keys)
            yield Part(heads, seen, (flat_q[heads].to(wide) * scale).contiguous(), part_k, part_v)


def _choose(part: Part, top_k: int, values: Tensor, indices: Tensor, tied: Tensor) -> None:
    """Write the largest scores of every query (G, L, top_k), their keys, and where the next one equals the last."""
    (groups, length, _), ranges = part.q.shape, part.ranges
    size = max(1, min(length, SLICE_ROWS, SLICE_PAIRS // (groups * ranges.width)))
    for start in range(0, length, size):
        rows = slice(start, min(start + size, length))
        first, last = int(ranges.first[rows.start]), int(ranges.last[rows.stop - 1])
        if first >= last:
            continue
        scores = visible_scores(part.q[:, rows], part.k[:, first:last], ranges.piece(rows, first)).flatten(0, 1)
        columns, ties = chosen(scores, partial(_largest_and_ties, count=top_k), below=(scores.shape[1], 2))
        kept = columns.shape[1]
        values[:, rows, :kept] = scores.gather(1, columns).unflatten(0, (groups, -1))
        indices[:, rows, :kept] = (columns + first).unflatten(0, (groups, -1))
        tied[:, rows] = ties.unflatten(0, (groups, -1))


def _largest_and_ties(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Columns of the largest scores of every row (N, W), at most `count`, and where the next one equals the last."""
    values, columns = largest(scores, min(count + 1, scores.shape[1]))
    if values.shape[1] <= count:
        return columns, torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    return columns[:, :count], (values[:, -1] == values[:, -2]) & (values[:, -1] > -torch.inf)


def visible_scores(q: Tensor, k: Tensor, ranges: KeyRanges) -> Tensor:
    """Scores (G, R, C) of queries (G, R, E) and keys (G, C, E), -inf where the ranges, theirs, don't reach."""
    scores = product(q[0], k[0])[None] if q.shape[0] == 1 else q @ k.mT
    hide_(scores, ranges)
    return scores


def _gradients(part: Part, grad: Tensor, weights: Tensor, indices: Tensor) -> list[Tensor]:
    """Gradients of q, k and v from the kept scores."""
    if not weights.shape[2]:
        return [torch.zeros_like(tensor) for tensor in (part.q, part.k, part.v)]
    grad_scores = softmax_backward(weights, weights_gradient(part.v, indices, grad))
    pairs = pairs_by_key(indices, part.ranges.width)
    return [
        weighted_rows(part.k, indices, grad_scores),
        rows_by_key(part.q, pairs, grad_scores),
        rows_by_key(grad, pairs, weights),
    ]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    top_k: int,
    valid: Tensor | None,
    query_offset: int | Tensor,
    segments: Tensor | None,
    key_segments: Tensor | None,
) -> None:
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q, k, v))
    if not q.ndim == k.ndim == v.ndim == 4 or q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"topk_attention: expected q (B, H, L, E), k (B, H, S, E), v (B, H, S, Ev), got {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"topk_attention: expected q and k of one width, got {shapes}")
    if top_k < 1:
        raise ValueError(f"topk_attention: top_k must be at least 1, got {top_k}")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != (k.shape[0], k.shape[2])):
        expected = (k.shape[0], k.shape[2])
        raise ValueError(f"topk_attention: valid must be bool {expected}, got {valid.dtype} {tuple(valid.shape)}")
    if isinstance(query_offset, Tensor) and query_offset.shape != q.shape[:1]:
        raise ValueError(f"topk_attention: query_offset must be an int or ({q.shape[0]},), got {query_offset.shape}")
    if (segments is None) != (key_segments is None):
        raise ValueError("topk_attention: segments and key_segments go together; give both, or neither")
