"""Causal attention to a segment, to the memory before it and to rows that stand for older tokens.

    s_ij as in `memory_attention`        s'_im = ((q_i + u) · k'_m + (q_i + w') · r'_δ(i,m)) / √E
    o_i = Σ_j P_ij v_j + Σ_m P'_im v'_m        (P_i, P'_i) = softmax over visible j and m of (s_i, s'_i)

A query sees a range of the rows m. Those are at distances δ(i, m) = a_i + step · (b_i - m), b_i the end of the range.

The two sums are computed apart, and joined by the log-sum-exps of their scores. Scores of rows are made again in the
backward pass, some queries at a time: the products of a query with all r', of which every row takes its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.ops.memory.attention import (
    SLICE_PAIRS,
    Distances,
    Memory,
    VisibleColumns,
    memory_attention_with_lse,
    memory_scores_by_table,
    read_by_table,
)
from subquad.ops.precision import full_precision, wide_dtype
from subquad.ops.recomputed import recomputed
from subquad.ops.softmax import masked_softmax_with_lse


class VisibleRows(NamedTuple):
    """Which rows a query sees and how far they are.

    Attributes:
        first: int64 (B or 1, L), the first row that is visible.
        stop: int64 (B or 1, L), the end of those.
        ahead: int64 (B or 1, L), the query's distance from the end of the rows.
        step: distance from one row to the next.
    """

    first: Tensor
    stop: Tensor
    ahead: Tensor
    step: int


class CompressedRows(NamedTuple):
    """Rows, and how they are seen.

    Attributes:
        k: (B, H, R, E).
        v: (B, H, R, E).
        distances: r', u and w'.
        sight: who sees what.
    """

    k: Tensor
    v: Tensor
    distances: Distances
    sight: VisibleRows


def compressed_attention_by_table(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distances: Distances,
    reach: VisibleColumns,
    memory: Memory | None = None,
    rows: CompressedRows | None = None,
) -> Tensor:
    """The definition of `compressed_attention`: one softmax; arguments and result as there."""
    scores, own = memory_scores_by_table(q, k, distances, reach, memory)
    if rows is None:
        return read_by_table(scores.softmax(dim=-1), own, v, memory)
    m = torch.arange(rows.k.shape[2], device=q.device)
    first, stop, ahead = (fact[:, None, :, None] for fact in rows.sight[:3])
    vectors, u, w = rows.distances
    table = vectors[
        :, (ahead + rows.sight.step * (stop - m))[:, 0].clamp(0, vectors.shape[1] - 1)
    ]  # (H, B or 1, L, R, E)
    position = torch.einsum("bhle,hblre->bhlr", q + w[:, None], table.expand(-1, q.shape[0], -1, -1, -1))
    of_rows = ((q + u[:, None]) @ rows.k.mT + position) / math.sqrt(q.shape[-1])
    of_rows = of_rows.masked_fill((m < first) | (m >= stop), -math.inf)
    weights, row_weights = torch.cat((scores, of_rows), dim=-1).softmax(dim=-1).split([k.shape[2], len(m)], dim=-1)
    return read_by_table(weights, own, v, memory) + row_weights @ rows.v


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distances: Distances,
    reach: VisibleColumns,
    memory: Memory | None = None,
    rows: CompressedRows | None = None,
) -> Tensor:
    """Attend.

    Args:
        q: (B, H, L, E), queries of the last L columns.
        k: (B, H, S, E).
        v: (B, H, S, E).
        distances: what positions add to scores of tokens.
        reach: what each query sees, at least its own column.
        memory: as in `memory_attention`.
        rows: what stands for older tokens; None for nothing.

    Returns:
        (B, H, L, E), the dtype of q.
    """
    out, lse = memory_attention_with_lse(q, k, v, distances, reach, memory)
    if rows is None:
        return out
    found, found_lse = [], []
    for part in row_slices(q, rows):
        vectors, u, w = rows.distances
        given = (
            q[:, :, part.queries],
            rows.k[:, :, part.rows],
            rows.v[:, :, part.rows],
            vectors[:, part.vectors],
            u,
            w,
        )
        of_part = checkpoint(read_rows, *given, part, use_reentrant=False, preserve_rng_state=False)
        found.append(of_part[0])
        found_lse.append(of_part[1])
    of_rows, of_rows_lse = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2) for parts in (found, found_lse))
    return recomputed(_joined, out, lse, of_rows, of_rows_lse)


class RowSlice(NamedTuple):
    """Some queries and the rows that they see.

    Attributes:
        queries: which.
        rows: from the first row that any of them sees to the last.
        vectors: from the least distance among them to the largest.
        indices: int64 (B or 1, 1, queries, rows), which of these distances a pair has.
        visible: bool, likewise.
    """

    queries: slice
    rows: slice
    vectors: slice
    indices: Tensor
    visible: Tensor


def row_slices(q: Tensor, rows: CompressedRows) -> Iterator[RowSlice]:
    """All queries, some at a time, each slice with at least one row."""
    batch, num_heads, length, _ = q.shape
    size = max(1, SLICE_PAIRS // max(1, batch * num_heads * rows.k.shape[2]))
    for start in range(0, length, size):
        yield row_slice(rows, slice(start, min(start + size, length)))


def row_slice(rows: CompressedRows, queries: slice) -> RowSlice:
    """What these queries see."""
    first, stop, ahead = (fact[:, None, queries, None] for fact in rows.sight[:3])
    seeing, farthest = stop > first, rows.distances.vectors.shape[1] - 1
    begin = int(torch.where(seeing, first, rows.k.shape[2] - 1).min())
    end = max(begin + 1, int(torch.where(seeing, stop, 0).max()))
    m = torch.arange(begin, end, device=first.device)
    visible = (m >= first) & (m < stop)
    distance = (ahead + rows.sight.step * (stop - m)).clamp(0, farthest)
    least = int(torch.where(visible, distance, farthest).min())
    most = max(least, int(torch.where(visible, distance, 0).max()))
    indices = (distance - least).clamp(0, most - least)
    return RowSlice(queries, slice(begin, end), slice(least, most + 1), indices, visible)


def read_rows(
    q: Tensor, k: Tensor, v: Tensor, vectors: Tensor, content_bias: Tensor, position_bias: Tensor, part: RowSlice
) -> tuple[Tensor, Tensor]:
    """What the queries of a slice read of rows, (B, H, queries, E), and the log-sum-exp of their scores.

    A query that sees no row reads 0, with a log-sum-exp of -inf.
    """
    with full_precision(q.device):
        scores = row_scores(q, k, Distances(vectors, content_bias, position_bias), part)
        weights, lse = masked_softmax_with_lse(scores, part.visible)
        return (weights @ v.to(scores.dtype)).to(q.dtype), lse


def row_scores(q: Tensor, k: Tensor, distances: Distances, part: RowSlice) -> Tensor:
    """Scores of the queries q (B, H, queries, E) and the rows k (B, H, rows, E) of a slice, also of hidden pairs."""
    wide = wide_dtype(q)
    q, k, vectors, u, w = (tensor.to(wide) for tensor in (q, k, *distances))
    by_distance = (q + w[:, None]) @ vectors.mT
    position = by_distance.gather(-1, part.indices.expand(*by_distance.shape[:2], -1, -1))
    return ((q + u[:, None]) @ k.mT + position) * q.shape[-1] ** -0.5


def _joined(out: Tensor, lse: Tensor, of_rows: Tensor, of_rows_lse: Tensor) -> Tensor:
    """Two results as one, weighted by their shares of all scores."""
    total = torch.logaddexp(lse, of_rows_lse)
    shares = (lse - total).exp(), (of_rows_lse - total).exp()
    return (shares[0][..., None] * out + shares[1][..., None] * of_rows).to(out.dtype)
