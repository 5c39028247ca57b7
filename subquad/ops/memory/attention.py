"""Causal attention to a segment and to the memory before it, with positions that are distances.

    s_ij = ((q_i + u) · k_j + (q_i + w) · r_(i-j)) / √E        o_i = Σ_j P_ij v_j,  P_i = softmax over visible j of s_i

Queries are the last L of the S columns of keys, and query i sees a range of columns that ends with itself. Keys and
values before its own segment are memory: their gradient is kept apart, so that it can stop there.

The products of a query with all r are its relative scores in order of their distance; moving each row by one more
column than the row before puts them in order of the keys. Scores are made again in the backward pass, some queries at a
time, so that what is kept is linear in the length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.precision import full_precision, wide_dtype

SLICE_PAIRS = 2**20
"""Scores that are held at a time, over the whole batch and all heads; at least one query runs at a time."""


class Distances(NamedTuple):
    """What positions add to scores.

    Attributes:
        vectors: r of the distances 0, 1, ..., (H, N, E); larger distances take the last.
        content_bias: u, (H, E).
        position_bias: w, (H, E).
    """

    vectors: Tensor
    content_bias: Tensor
    position_bias: Tensor


class VisibleColumns(NamedTuple):
    """Where what a query sees begins; it ends with the query's own column.

    Attributes:
        first: int64 (B or 1, L), the first column that is visible.
        own: int64 (B or 1, L), the first column of the query's own segment; those before it are memory.
    """

    first: Tensor
    own: Tensor


class Memory(NamedTuple):
    """Keys and values once more, equal to those beside it, for the gradient of what is memory to a query.

    Attributes:
        k: (B, H, S, E).
        v: (B, H, S, E).
    """

    k: Tensor
    v: Tensor


def memory_attention_by_table(
    q: Tensor, k: Tensor, v: Tensor, distances: Distances, reach: VisibleColumns, memory: Memory | None = None
) -> Tensor:
    """The definition of `memory_attention`, with an r for every pair; arguments and result as there."""
    scores, own = memory_scores_by_table(q, k, distances, reach, memory)
    return read_by_table(scores.softmax(dim=-1), own, v, memory)


def memory_scores_by_table(
    q: Tensor, k: Tensor, distances: Distances, reach: VisibleColumns, memory: Memory | None = None
) -> tuple[Tensor, Tensor]:
    """Scores (B, H, L, S), -inf where hidden, and which pairs lie in one segment, bool (B or 1, 1, L, S)."""
    i = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    j = torch.arange(k.shape[2], device=q.device)
    table = distances.vectors[:, (i - j).clamp(0, distances.vectors.shape[1] - 1)]
    visible, own = ((j <= i) & (j >= first[:, None, :, None]) for first in reach)
    past = k if memory is None else memory.k
    q_content, q_position = q + distances.content_bias[:, None], q + distances.position_bias[:, None]
    content = torch.where(own, q_content @ k.mT, q_content @ past.mT)
    scores = (content + torch.einsum("bhle,hlse->bhls", q_position, table)) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~visible, -math.inf), own


def read_by_table(weights: Tensor, own: Tensor, v: Tensor, memory: Memory | None) -> Tensor:
    """What queries read with weights (B, H, L, S), of memory from its values apart."""
    return (weights * own) @ v + (weights * ~own) @ (v if memory is None else memory.v)


def memory_attention(
    q: Tensor, k: Tensor, v: Tensor, distances: Distances, reach: VisibleColumns, memory: Memory | None = None
) -> Tensor:
    """Attend; arguments and result as the first of `memory_attention_with_lse`."""
    return memory_attention_with_lse(q, k, v, distances, reach, memory)[0]


def memory_attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, distances: Distances, reach: VisibleColumns, memory: Memory | None = None
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        q: (B, H, L, E), queries of the last L columns.
        k: (B, H, S, E).
        v: (B, H, S, E).
        distances: what positions add.
        reach: what each query sees, at least its own column.
        memory: takes the gradient of keys and values before a query's own segment; None where k and v take all of it.

    Returns:
        out (B, H, L, E), the dtype of q, laid out as (B, L, H, E), and the log-sum-exp (B, H, L) of the scores, in
        float32 or wider.
    """
    past = (None, None) if memory is None else memory
    return _MemoryAttention.apply(q, k, v, *distances, *past, reach)  # pyright: ignore[reportReturnType] - untyped


class Slice(NamedTuple):
    """Some queries and the columns that they see.

    Attributes:
        rows: the queries.
        columns: from the first that any of them sees to the last.
        indices: int64 (rows + columns - 1,), which r the distances take, the largest distance first.
        visible: bool (B or 1, 1, rows, columns).
        own: bool, likewise: visible and in the query's own segment; None where all of it is.
    """

    rows: slice
    columns: slice
    indices: Tensor
    visible: Tensor
    own: Tensor | None


def slices(q: Tensor, k: Tensor, count: int, reach: VisibleColumns) -> Iterator[Slice]:
    """All slices; `count` is the number of distances with an r of their own."""
    batch, num_heads, length, _ = q.shape
    before, device = k.shape[2] - length, q.device
    size = max(1, SLICE_PAIRS // max(1, batch * num_heads * k.shape[2]))
    for start in range(0, length, size):
        rows = slice(start, min(start + size, length))
        first, own = (part[:, None, rows, None] for part in reach)
        columns = slice(int(first.min()), before + rows.stop)
        i = torch.arange(before + start, columns.stop, device=device)[:, None]
        j = torch.arange(columns.start, columns.stop, device=device)
        farthest = columns.stop - 1 - columns.start
        indices = (farthest - torch.arange(len(i) + len(j) - 1, device=device)).clamp(0, count - 1)
        visible, is_own = (j <= i) & (j >= first), (j <= i) & (j >= own)
        yield Slice(rows, columns, indices, visible, None if bool(own.max() <= columns.start) else is_own)


def attend_slice(q: Tensor, k: Tensor, v: Tensor, distances: Distances, part: Slice) -> tuple[Tensor, Tensor]:
    """What the queries of a slice read, (B, H, rows, E), and the log-sum-exp of their scores, (B, H, rows)."""
    scores = slice_scores(q, k, distances, part)
    return scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1)


def slice_scores(q: Tensor, k: Tensor, distances: Distances, part: Slice) -> Tensor:
    """Scores of the queries q (B, H, rows, E) and the keys k (B, H, columns, E) of a slice, -inf where hidden."""
    position = (q + distances.position_bias[:, None]) @ distances.vectors[:, part.indices].mT
    content = (q + distances.content_bias[:, None]) @ k.mT
    return content.add_(_by_key(position)).mul_(q.shape[-1] ** -0.5).masked_fill_(~part.visible, -math.inf)


def _by_key(position: Tensor) -> Tensor:
    """Scores (B, H, n, n + m - 1) in order of the distances -> a view (B, H, n, m) in order of the keys."""
    rows, width = position.shape[2:]
    shape = (*position.shape[:3], width + 1 - rows)
    strides = (*position.stride()[:2], width - 1, 1)
    return position.as_strided(shape, strides, position.storage_offset() + rows - 1)


class _MemoryAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        vectors: Tensor,
        content_bias: Tensor,
        position_bias: Tensor,
        memory_k: Tensor | None,
        memory_v: Tensor | None,
        reach: VisibleColumns,
    ) -> tuple[Tensor, Tensor]:
        wide = wide_dtype(q)
        batch, num_heads, length, width = q.shape
        out = q.new_empty(batch, length, num_heads, width).transpose(1, 2)
        lse = q.new_empty(batch, num_heads, length, dtype=wide)
        distances = Distances(*(tensor.to(wide) for tensor in (vectors, content_bias, position_bias)))
        wide_k, wide_v = k.to(wide), v.to(wide)
        with full_precision(q.device):
            for part in slices(q, k, vectors.shape[1], reach):
                part_k, part_v = wide_k[:, :, part.columns], wide_v[:, :, part.columns]
                result = attend_slice(q[:, :, part.rows].to(wide), part_k, part_v, distances, part)
                out[:, :, part.rows], lse[:, :, part.rows] = result[0].to(q.dtype), result[1]
        ctx.save_for_backward(q, k, v, vectors, content_bias, position_bias, out, lse)
        ctx.reach, ctx.apart = reach, memory_k is not None
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor, grad_lse: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, *of_distances, out, lse = ctx.saved_tensors
        wide, scale = lse.dtype, q.shape[-1] ** -0.5
        wide_q, wide_k, wide_v = (tensor.to(wide) for tensor in (q, k, v))
        distances = Distances(*(tensor.to(wide) for tensor in of_distances))
        grads = [torch.zeros_like(tensor) for tensor in (wide_q, wide_k, wide_v, *distances)]
        past = [torch.zeros_like(tensor) for tensor in (wide_k, wide_v)] if ctx.apart else None
        with full_precision(q.device):
            for part in slices(q, k, of_distances[0].shape[1], ctx.reach):
                part_q, part_k = wide_q[:, :, part.rows], wide_k[:, :, part.columns]
                weights = slice_scores(part_q, part_k, distances, part).sub_(lse[:, :, part.rows, None]).exp_()
                upstream = grad[:, :, part.rows].to(wide)
                change = upstream @ wide_v[:, :, part.columns].mT
                common = grad_lse[:, :, part.rows] - (upstream * out[:, :, part.rows]).sum(dim=-1)
                change.add_(common[..., None]).mul_(weights).mul_(scale)
                _add_query_gradients(grads, change, part_q, part_k, distances, part)
                content = part_q + distances.content_bias[:, None]
                for index, (pairs, rows) in enumerate(((change, content), (weights, upstream))):
                    _add_key_gradients(grads[1 + index], None if past is None else past[index], pairs, rows, part)
        dtypes = [tensor.dtype for tensor in (q, k, v, *of_distances)]
        of_memory = (None, None) if past is None else (tensor.to(k.dtype) for tensor in past)
        return *(tensor.to(dtype) for tensor, dtype in zip(grads, dtypes, strict=True)), *of_memory, None


def _add_query_gradients(
    grads: list[Tensor], change: Tensor, q: Tensor, k: Tensor, distances: Distances, part: Slice
) -> None:
    """Add what the gradient of scores (B, H, rows, columns) gives to q, r, u and w; `grads` is in order of `apply`."""
    by_distance = change.new_zeros(*change.shape[:3], len(part.indices))
    _by_key(by_distance).copy_(change)
    of_content, of_position = change @ k, by_distance @ distances.vectors[:, part.indices]
    of_vectors = (by_distance.mT @ (q + distances.position_bias[:, None])).sum(dim=0)
    grads[0][:, :, part.rows] = of_content + of_position
    grads[3].index_add_(1, part.indices, of_vectors)
    grads[4] += of_content.sum(dim=(0, 2))
    grads[5] += of_position.sum(dim=(0, 2))


def _add_key_gradients(grad: Tensor, past: Tensor | None, pairs: Tensor, rows: Tensor, part: Slice) -> None:
    """Add a sum over queries, weighted by pair, to the gradient of keys or values, and that of memory to `past`."""
    if past is None or part.own is None:
        grad[:, :, part.columns] += pairs.mT @ rows
        return
    grad[:, :, part.columns] += (pairs * part.own).mT @ rows
    past[:, :, part.columns] += (pairs * ~part.own).mT @ rows


def project_memory(projected: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A projection that has been computed, with a gradient that reaches its weights and stops at its input.

    Args:
        projected: x · weightᵀ + bias, (B, L, F).
        x: (B, L, D).
        weight: (F, D).
        bias: (F,), or None.
    """
    return _ProjectMemory.apply(projected.detach(), x.detach(), weight, bias)  # pyright: ignore[reportReturnType] - untyped


class _ProjectMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return projected.view_as(projected)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        (x,), (of_weight, of_bias) = ctx.saved_tensors, ctx.dtypes
        rows = grad.flatten(0, 1)
        grad_weight = (rows.mT @ x.flatten(0, 1).to(grad.dtype)).to(of_weight)
        return None, None, grad_weight, None if of_bias is None else rows.sum(dim=0).to(of_bias)
