"""Dense attention in slices of queries: what runs where a pattern saves nothing.

All examples and heads run together, each slice against the keys that the pattern's distances allow. Small masks
are remembered from call to call, others made again in the backward pass; autograd keeps nothing but q, k, v, the result
and its log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.fused import fused_backward, fused_forward, lse_backward
from subquad.ops.partial_softmax import Bias, make_bias
from subquad.ops.pattern.request import Facts, Request, visible_mask
from subquad.patterns.pattern import UNBOUNDED, Pattern

SLICE_PAIRS = 2**21
"""Largest mask of a slice, in pairs of all examples and heads that differ; at least one query runs at a time."""
REMEMBERED_PAIRS = 2**19
"""Largest masks that are kept for the next call."""


class Slice(NamedTuple):
    """Some queries, the keys that they may reach, and what they see of them; no bias where they see everything."""

    rows: slice
    columns: slice
    bias: Bias | None


def attend_sliced(q: Tensor, k: Tensor, v: Tensor, request: Request) -> tuple[Tensor, Tensor]:
    """Attend; arguments and result as in `pattern_attention_with_lse`, on the CPU."""
    return _SlicedAttention.apply(q, k, v, request)  # pyright: ignore[reportReturnType] - apply has no types


def _slices(q: Tensor, k: Tensor, request: Request) -> Iterable[Slice]:
    """All slices; made anew where masks are large or depend on the examples."""
    batch, num_heads, length, key_length = *q.shape[:3], k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    masks = num_heads if request.pattern.num_heads else 1
    if request.facts.anything or len(request.offsets) > 1 or masks * length * key_length > REMEMBERED_PAIRS:
        return _make_slices(request, batch, num_heads, length, key_length, dtype)
    return _remembered_slices(request.pattern, request.offset(0), num_heads, length, key_length, dtype)


@lru_cache(maxsize=16)
def _remembered_slices(
    pattern: Pattern, offset: int, num_heads: int, length: int, key_length: int, dtype: torch.dtype
) -> tuple[Slice, ...]:
    """A pure function, remembered because layers ask again: with few tokens masks cost more than attention."""
    request = Request(pattern, Facts(), (offset,), scale=1.0)
    return tuple(_make_slices(request, 1, num_heads, length, key_length, dtype))


def _make_slices(
    request: Request, batch: int, num_heads: int, length: int, key_length: int, dtype: torch.dtype
) -> Iterator[Slice]:
    pattern = request.pattern.resolve(key_length)
    low, high = (-UNBOUNDED, UNBOUNDED) if request.facts.global_keys is not None else pattern.offsets()
    masks = batch * (num_heads if pattern.num_heads else 1)
    size = max(1, min(length, SLICE_PAIRS // (masks * key_length)))
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = max(0, start + min(request.offsets) - high)
        last = min(key_length, stop + max(request.offsets) - low)
        if first >= last:
            continue
        visible = visible_mask(request, pattern, num_heads, range(start, stop), range(first, last))
        bias = None if bool(visible.all()) else make_bias(visible, dtype)
        yield Slice(slice(start, stop), slice(first, last), bias)


class _SlicedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, request: Request) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=dtype)
        wide_q, wide_k, wide_v = (tensor.to(dtype) for tensor in (q, k, v))
        for rows, columns, bias in _slices(q, k, request):
            part_k, part_v = wide_k[:, :, columns], wide_v[:, :, columns]
            values = None if bias is None else bias.values
            part, part_lse = fused_forward(wide_q[:, :, rows], part_k, part_v, request.scale, values)
            if bias is not None and bias.hidden_rows is not None:
                part_lse = part_lse.masked_fill(bias.hidden_rows, -torch.inf)
            out[:, :, rows], lse[:, :, rows] = part, part_lse
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.request = request
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        request, dtype = ctx.request, lse.dtype
        grads = [torch.zeros_like(tensor, dtype=dtype) for tensor in (q, k, v)]
        upstream = torch.zeros_like(out) if grad_out is None else grad_out
        wide_q, wide_k, wide_v, wide_out, upstream = (tensor.to(dtype) for tensor in (q, k, v, out, upstream))
        upstream = upstream if upstream.stride(-1) == 1 else upstream.contiguous()
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        for rows, columns, bias in _slices(q, k, request):
            part_q, part_k, part_v = wide_q[:, :, rows], wide_k[:, :, columns], wide_v[:, :, columns]
            part_lse, values = finite[:, :, rows], None if bias is None else bias.values
            of_out = upstream[:, :, rows], part_q, part_k, part_v, wide_out[:, :, rows], part_lse
            grad_q, grad_k, grad_v = fused_backward(*of_out, request.scale, values)
            if grad_lse is not None:
                more = lse_backward(grad_lse[:, :, rows], part_q, part_k, part_lse, request.scale, values)
                grad_q, grad_k = grad_q + more[0], grad_k + more[1]
            grads[0][:, :, rows] += grad_q
            grads[1][:, :, columns] += grad_k
            grads[2][:, :, columns] += grad_v
        return *(grad.to(q.dtype) for grad in grads), None
