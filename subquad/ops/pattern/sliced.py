"""Dense attention in slices of queries: what runs where a pattern saves nothing.

All examples and heads run together, each slice against the keys that the pattern's distances allow. Small masks
are remembered from call to call, others made again in the backward pass; autograd keeps nothing but q, k, v, the result
and its log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.fused import fused_backward, fused_forward, lse_backward
from subquad.ops.partial_softmax import Bias, make_bias
from subquad.ops.pattern.request import Facts, Request, visible_mask
from subquad.ops.pattern.row_slices import row_slices
from subquad.ops.pattern.strips import Shape
from subquad.ops.precision import wide_dtype
from subquad.patterns.pattern import UNBOUNDED, Indices, Pattern, Tile

SLICE_PAIRS = 2**21
"""Largest mask of a slice, in pairs of all examples and heads that differ; at least one query runs at a time."""
REMEMBERED_PAIRS = 2**19
"""Largest masks that are kept for the next call as they are."""
NARROWED_PAIRS = 2**21
"""Largest masks that are kept in bfloat16, which has 0 and -inf: to make them takes longer than attention."""
MOST_KEPT = 0.6
"""Largest mask that autograd may keep, in multiples of q: a seventh of what it keeps anyway, q, k, v and the result."""
BLOCK = 64
"""Tokens that are classified together where the pattern has no blocks of its own."""


class Slice(NamedTuple):
    """Some queries, the keys that they may reach, and what they see of them; no bias where they see everything."""

    rows: slice
    columns: slice
    bias: Bias | None

    def to(self, like: Tensor) -> Slice:
        """The same for scores as wide as this tensor is, or as float32, on its device."""
        return self if self.bias is None else self._replace(bias=self.bias.to(like.device, wide_dtype(like)))


def attend_sliced(
    q: Tensor, k: Tensor, v: Tensor, request: Request, shape: Shape, *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attend; arguments and result as in `pattern_attention_with_lse`.

    Args:
        q: see there.
        k: see there.
        v: see there.
        request: see there; its facts on the CPU.
        shape: of the problem; what a call costs decides how many slices there are.
        with_lse: whether the log-sum-exp is needed; it may be None where it isn't.
    """
    if not with_lse:
        out = _attend_at_once(q, k, v, request, shape)
        if out is not None:
            return out, None
    return _SlicedAttention.apply(q, k, v, request, shape)  # pyright: ignore[reportReturnType] - apply has no types


def _attend_at_once(q: Tensor, k: Tensor, v: Tensor, request: Request, shape: Shape) -> Tensor | None:
    """One slice of everything by the operator's own node of the graph, which costs least; None for anything else."""
    slices = _remembered(q, k, request, shape)
    if slices is None or len(slices) != 1 or q.dtype != wide_dtype(q):
        return None
    rows, columns, bias = slices[0].to(q)
    if rows != slice(0, shape.queries) or columns != slice(0, shape.keys):
        return None
    if bias is not None and bias.values.numel() > MOST_KEPT * q.numel():
        return None
    return fused_forward(q, k, v, request.scale, None if bias is None else bias.values)[0]


def _slices(q: Tensor, k: Tensor, request: Request, shape: Shape) -> Iterator[Slice]:
    """All slices; made anew where masks are large or depend on the examples."""
    slices = _remembered(q, k, request, shape)
    if slices is None:
        slices = _make_slices(request, shape, len(q), q.shape[1], wide_dtype(q))
    return (part.to(q) for part in slices)


def _remembered(q: Tensor, k: Tensor, request: Request, shape: Shape) -> tuple[Slice, ...] | None:
    """All slices, where their masks are small and don't depend on the examples; perhaps narrowed."""
    if request.facts.anything or len(request.offsets) > 1:
        return None
    pairs = (q.shape[1] if request.pattern.num_heads else 1) * q.shape[2] * k.shape[2]
    if pairs > NARROWED_PAIRS and not _shows_everything(request.pattern, shape):
        return None
    dtype = torch.bfloat16 if pairs > REMEMBERED_PAIRS else wide_dtype(q)
    return _remembered_slices(request.pattern, shape, q.shape[1], dtype)


@lru_cache(maxsize=64)
def _shows_everything(pattern: Pattern, shape: Shape) -> bool:
    """Whether every query sees every key, so that there are no masks."""
    pattern = _resolved(pattern, shape.keys)
    heads = range(shape.heads if pattern.num_heads else 1)
    key0, key1, _ = _blocks(torch.arange(shape.keys), pattern.block or BLOCK)
    query0, query1, _ = _blocks(shape.offset + torch.arange(shape.queries), pattern.block or BLOCK)
    return all(
        bool((pattern.of_head(head).tiles(first, last, key0, key1) == Tile.FULL).all())
        for head in heads
        for first, last in zip(query0[:, None], query1[:, None], strict=True)
    )


@lru_cache(maxsize=16)
def _resolved(pattern: Pattern, keys: int) -> Pattern:
    return pattern.resolve(keys)


@lru_cache(maxsize=16)
def _remembered_slices(pattern: Pattern, shape: Shape, num_heads: int, dtype: torch.dtype) -> tuple[Slice, ...]:
    """A pure function, remembered because layers ask again: with few tokens masks cost more than attention."""
    return tuple(_make_slices(Request(pattern, Facts(), (shape.offset,), scale=1.0), shape, 1, num_heads, dtype))


def _make_slices(request: Request, shape: Shape, batch: int, num_heads: int, dtype: torch.dtype) -> Iterator[Slice]:
    pattern = _resolved(request.pattern, shape.keys)
    low, high = (-UNBOUNDED, UNBOUNDED) if request.facts.global_keys is not None else pattern.offsets()
    first, last = min(request.offsets), max(request.offsets)
    masks = batch * (num_heads if pattern.num_heads else 1)
    most_rows = max(1, SLICE_PAIRS // (masks * shape.keys))
    strips = row_slices(replace(shape, offset=first), low - (last - first), high, most_rows)
    bounds = (strips.row0, strips.row1, strips.column0, strips.column1)
    for row0, row1, column0, column1 in zip(*(bound.tolist() for bound in bounds), strict=True):
        visible = visible_mask(request, pattern, num_heads, range(row0, row1), range(column0, column1), _ask)
        bias = None if bool(visible.all()) else make_bias(visible, dtype)
        yield Slice(slice(row0, row1), slice(column0, column1), bias)


def _ask(pattern: Pattern, query: Tensor, key: Tensor) -> Tensor:
    """What is visible of consecutive queries (n, rows, 1) and keys; whole blocks are asked about together."""
    size = pattern.block
    if size is None or len(query) > 1:
        return pattern.visible(query, key)
    query0, query1, rows = _blocks(query.flatten(), size)
    key0, key1, columns = _blocks(key, size)
    classes = pattern.tiles(query0[:, None], query1[:, None], key0, key1)
    if (classes == Tile.PARTIAL).any():
        return pattern.visible(query, key)
    seen = np.broadcast_to(classes == Tile.FULL, (len(query0), len(key0)))
    return torch.from_numpy(seen.repeat(columns, axis=1).repeat(rows, axis=0))[None]


def _blocks(position: Tensor, size: int) -> tuple[Indices, Indices, Indices]:
    """The blocks that consecutive positions stand in: first and last of each, and how many."""
    first, last = int(position[0]), int(position[-1])
    starts = np.arange(first // size * size, last + 1, size)
    first_of, last_of = np.maximum(starts, first), np.minimum(starts + size - 1, last)
    return first_of, last_of, last_of - first_of + 1


class _SlicedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, request: Request, shape: Shape) -> tuple[Tensor, Tensor]:
        dtype = wide_dtype(q)
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=dtype)
        wide_q, wide_k, wide_v = (tensor.to(dtype) for tensor in (q, k, v))
        for rows, columns, bias in _slices(q, k, request, shape):
            part_k, part_v = wide_k[:, :, columns], wide_v[:, :, columns]
            values = None if bias is None else bias.values
            part, part_lse = fused_forward(wide_q[:, :, rows], part_k, part_v, request.scale, values)
            if bias is not None and bias.hidden_rows is not None:
                part_lse = part_lse.masked_fill(bias.hidden_rows, -torch.inf)
            out[:, :, rows], lse[:, :, rows] = part, part_lse
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.request, ctx.shape = request, shape
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        request, dtype = ctx.request, lse.dtype
        total_q, total_k, total_v = (torch.zeros_like(tensor, dtype=dtype) for tensor in (q, k, v))
        upstream = torch.zeros_like(out) if grad_out is None else grad_out
        wide_q, wide_k, wide_v, wide_out, upstream = (tensor.to(dtype) for tensor in (q, k, v, out, upstream))
        upstream = upstream if upstream.stride(-1) == 1 else upstream.contiguous()
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        for rows, columns, bias in _slices(q, k, request, ctx.shape):
            part_q, part_k, part_v = wide_q[:, :, rows], wide_k[:, :, columns], wide_v[:, :, columns]
            part_lse, values = finite[:, :, rows], None if bias is None else bias.values
            of_out = upstream[:, :, rows], part_q, part_k, part_v, wide_out[:, :, rows], part_lse
            grad_q, grad_k, grad_v = fused_backward(*of_out, request.scale, values)
            if grad_lse is not None:
                more = lse_backward(grad_lse[:, :, rows], part_q, part_k, part_lse, request.scale, values)
                grad_q, grad_k = grad_q + more[0], grad_k + more[1]
            total_q[:, :, rows] = grad_q
            total_k[:, :, columns] += grad_k
            total_v[:, :, columns] += grad_v
        return *(total.to(q.dtype) for total in (total_q, total_k, total_v)), None, None
