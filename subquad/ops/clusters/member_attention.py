"""Attention between the members of clusters, which may have tokens in common.

    o_i = 1 / (n_i + ε) Σ_{clusters c with i among its queries} softmax over c's keys of τ q_i · k_j

n_i is the number of clusters that i is in; in none it gets 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.fused import fused_backward, fused_forward
from subquad.ops.partial_softmax import CALL_BYTES
from subquad.ops.precision import wide_dtype
from subquad.ops.softmax import softmax_attention_with_lse


def member_attention_by_clusters(
    q: Tensor, k: Tensor, v: Tensor, queries: list[Tensor], keys: list[Tensor], *, scale: float, epsilon: float
) -> Tensor:
    """The definition, one cluster after the other. Arguments and result as in `member_attention`."""
    wide = wide_dtype(q)
    examples = []
    for b, (rows_of, columns_of) in enumerate(zip(queries, keys, strict=True)):
        heads = []
        for h in range(q.shape[1]):
            total, count = (
                torch.zeros_like(q[b, h], dtype=wide),
                torch.zeros(q.shape[2], 1, dtype=wide, device=q.device),
            )
            for rows, columns in zip(rows_of[h], columns_of[h], strict=True):
                visible = torch.ones(len(rows), len(columns), dtype=torch.bool, device=q.device)
                found, _ = softmax_attention_with_lse(q[b, h, rows], k[b, h, columns], v[b, h, columns], visible, scale)
                total = total.index_add(0, rows, found.to(wide))
                count = count.index_add(0, rows, torch.ones_like(count[: len(rows)]))
            heads.append(torch.where(count > 0, total / (count + epsilon).clamp_min(1e-30), 0.0))
        examples.append(torch.stack(heads))
    return torch.stack(examples).to(v.dtype)


def member_attention(
    q: Tensor, k: Tensor, v: Tensor, queries: list[Tensor], keys: list[Tensor], *, scale: float, epsilon: float
) -> Tensor:
    """Attention of each cluster's queries to its keys, averaged over the clusters of a query.

    Autograd keeps q, k, v and the members; the results of single clusters are computed again.

    Args:
        q: (B, H, L, E).
        k: (B, H, L, E).
        v: (B, H, L, E).
        queries: for each example int64 (H, C, w), different queries in each cluster.
        keys: for each example int64 (H, C, w).
        scale: τ.
        epsilon: ε.

    Returns:
        (B, H, L, E), the dtype of v.
    """
    return _MemberAttention.apply(q, k, v, queries, keys, scale, epsilon)  # pyright: ignore[reportReturnType] - apply has no types


class _MemberAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: list[Tensor],
        keys: list[Tensor],
        scale: float,
        epsilon: float,
    ) -> Tensor:
        out = torch.empty_like(v)
        for b, h, tensors, rows, columns in _clusters((q, k, v), queries, keys):
            total = torch.zeros_like(tensors[0])
            for some_rows, some_columns in _some(rows, columns, tensors[0]):
                part_q, part_k, part_v = _gather(tensors, some_rows, some_columns)
                found, _ = fused_forward(part_q, part_k, part_v, scale)
                _add(total, some_rows, found)
            out[b, h] = total.mul_(_weights(rows, total, epsilon))
        ctx.save_for_backward(q, k, v, *queries, *keys)
        ctx.scale, ctx.epsilon = scale, epsilon
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        q, k, v, *members = ctx.saved_tensors
        queries, keys = members[: q.shape[0]], members[q.shape[0] :]
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for b, h, tensors, rows, columns in _clusters((q, k, v), queries, keys):
            grad = grad_out[b, h].to(tensors[0].dtype) * _weights(rows, tensors[0], ctx.epsilon)
            totals = [torch.zeros_like(x) for x in tensors]
            for some_rows, some_columns in _some(rows, columns, grad):
                part_q, part_k, part_v = _gather(tensors, some_rows, some_columns)
                found, lse = fused_forward(part_q, part_k, part_v, ctx.scale)
                upstream = _take(grad, some_rows)
                parts = fused_backward(upstream, part_q, part_k, part_v, found, lse, ctx.scale)
                for total, index, part in zip(totals, (some_rows, some_columns, some_columns), parts, strict=True):
                    _add(total, index, part)
            for target, total in zip(grads, totals, strict=True):
                target[b, h] = total
        return *grads, None, None, None, None


def _clusters(
    qkv: tuple[Tensor, Tensor, Tensor], queries: list[Tensor], keys: list[Tensor]
) -> Iterator[tuple[int, int, list[Tensor], Tensor, Tensor]]:
    """Example, head, its q, k, v (L, E), and its members (C, w)."""
    wide = wide_dtype(qkv[0])
    for b, (rows, columns) in enumerate(zip(queries, keys, strict=True)):
        for h in range(qkv[0].shape[1]):
            yield b, h, [x[b, h].to(wide).contiguous() for x in qkv], rows[h], columns[h]


def _some(rows: Tensor, columns: Tensor, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Members of a few clusters at a time, so that a call's temporaries stay in the cache."""
    if not rows.shape[1]:
        return
    size = max(1, CALL_BYTES // (4 * rows.shape[1] * like.shape[1] * like.element_size()))
    yield from zip(rows.split(size), columns.split(size), strict=True)


def _gather(tensors: list[Tensor], rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = tensors
    return _take(q, rows), _take(k, columns), _take(v, columns)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x (L, E) by index (n, w): (n, 1, w, E)."""
    return x.index_select(0, index.flatten()).view(len(index), 1, index.shape[1], -1)


def _add(total: Tensor, index: Tensor, part: Tensor) -> None:
    """Add (n, 1, w, E) to the tokens (L, E) that `index` (n, w) names."""
    total.index_add_(0, index.flatten(), part.reshape(-1, total.shape[1]))


def _weights(rows: Tensor, like: Tensor, epsilon: float) -> Tensor:
    """1 / (n + ε) for each token, (L, 1); what is in no cluster has no use for it."""
    counts = torch.bincount(rows.flatten(), minlength=len(like))[:, None].to(like.dtype)
    return 1 / (counts.masked_fill(counts == 0, 1.0) + epsilon)
