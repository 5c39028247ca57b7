"""The fast form of attention to own and sorted blocks.

Blocks stand in the batch dimension of the fused operator, a few at a time, so that temporaries stay in the cache.
Sorted keys and the sorting matrix are computed again in the backward pass: neither is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.fused import fused_backward, fused_forward
from subquad.ops.onednn import product
from subquad.ops.partial_softmax import CALL_BYTES
from subquad.ops.precision import wide_dtype
from subquad.ops.sorted_blocks.sorting import BlockScores, Sorting, sorting_matrices

Combine = Literal["joint", "sum", "logits"]
"""How own and sorted keys are put together."""


class SortedBlocks(NamedTuple):
    """The form of the attention.

    Attributes:
        block: tokens of a block.
        sorting: how blocks are sorted.
        combine: how own and sorted keys are put together.
    """

    block: int
    sorting: Sorting
    combine: Combine = "joint"


class Softmax(NamedTuple):
    """One softmax of some blocks.

    Attributes:
        k: (n, 1, S, E).
        v: (n, 1, S, E).
        own: how many keys, the first ones, are those of the own block.
        others: how many, the last ones, are those of the sorted block; where they are both they are sums.
        bias: (rows, S) or None.
        causal: row t sees the keys 0..t.
    """

    k: Tensor
    v: Tensor
    own: int
    others: int
    bias: Tensor | None = None
    causal: bool = False


class Stretch(NamedTuple):
    """Neighbouring blocks of equally many tokens.

    Attributes:
        first: the first block.
        blocks: n.
        rows: tokens of each; fewer than a whole block's where the sequence ends.
        places: sorted keys that they see.
    """

    first: int
    blocks: int
    rows: int
    places: int


def block_counts(lengths: list[int], block: int) -> list[int]:
    """Blocks that hold a token, of each example."""
    return [-(-length // block) for length in lengths]


def _cut(x: Tensor, stretch: Stretch, block: int, size: int) -> Tensor:
    """The first `size` tokens of each block of a stretch, (L, E) -> (n, 1, size, E), a view."""
    start = stretch.first * block
    return x[start : start + stretch.blocks * size].unflatten(0, (stretch.blocks, size))[:, None]


class _Sequence:
    """Keys and values of one head of one example, as they are and sorted, in whole blocks (N * block, E)."""

    def __init__(self, k: Tensor, v: Tensor, null: tuple[Tensor, Tensor] | None, matrix: Tensor, form: SortedBlocks):
        """K and v: (L, E); null: (E,) each; matrix: (N, N)."""
        self.form, self.matrix, self.null = form, matrix, null
        missing = -k.shape[0] % form.block
        self.own = [F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous() for x in (k, v)]
        self.sorted = [product(matrix, self._in_rows(x).T).view(x.shape) for x in self.own]
        if null is not None:
            for tokens, token in zip(self.sorted, null, strict=True):
                tokens[: form.block] = token

    def softmaxes(self, stretch: Stretch) -> list[Softmax]:
        """What the queries of a stretch see."""
        causal, block, rows, places = self.form.sorting.causal, self.form.block, stretch.rows, stretch.places
        own_k, own_v = (_cut(x, stretch, block, rows) for x in self.own)
        other_k, other_v = (_cut(x, stretch, block, places) for x in self.sorted)
        if self.form.combine == "joint":
            bias = _causal_bias(stretch, own_k) if causal else None
            keys, values = torch.cat((own_k, other_k), dim=2), torch.cat((own_v, other_v), dim=2)
            return [Softmax(keys, values, rows, places, bias)]
        if self.form.combine == "sum":
            return [Softmax(own_k, own_v, rows, 0, causal=causal), Softmax(other_k, other_v, 0, places)]
        own_k, own_v = (_cut(x, stretch, block, places) for x in self.own)  # zeros behind the end
        return [Softmax(own_k + other_k, own_v + other_v, rows, places, causal=causal)]

    def gradients(self, of_own: list[Tensor], of_sorted: list[Tensor]) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """Gradients of k and v, of the matrix, and of the null key and its value, from those of `own` and `sorted`."""
        of_null, of_matrix = [], torch.zeros_like(self.matrix)
        for own, other, tokens in zip(of_own, of_sorted, self.own, strict=True):
            if self.null is not None:
                of_null.append(other[: self.form.block].sum(dim=0))
                other[: self.form.block] = 0.0
            other_rows = self._in_rows(other)
            of_matrix += product(other_rows, self._in_rows(tokens))
            self._in_rows(own).add_(product(self.matrix.T.contiguous(), other_rows.T))
        return of_own, of_matrix, of_null

    def _in_rows(self, x: Tensor) -> Tensor:
        """A block in a row: (N * block, E) -> (N, block * E), a view."""
        return x.view(len(self.matrix), -1)


def _causal_bias(stretch: Stretch, like: Tensor) -> Tensor:
    """The own block up to itself, and the sorted one altogether."""
    bias = like.new_zeros(stretch.rows, stretch.rows + stretch.places)
    bias[:, : stretch.rows] = like.new_full((stretch.rows, stretch.rows), -torch.inf).triu(1)
    return bias


class FusedSortedBlocks(torch.autograd.Function):
    """`sorted_block_attention` with the lengths of the examples in place of `valid`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        null_k: Tensor | None,
        null_v: Tensor | None,
        form: SortedBlocks,
        lengths: list[int],
    ) -> Tensor:
        """The result, (B, H, L, E)."""
        wide = wide_dtype(q)
        out, lse = _room(q, lengths, q.dtype), _room(q[..., 0], lengths, wide)
        matrices = sorting_matrices(BlockScores(hidden, weight, bias), form.sorting, block_counts(lengths, form.block))
        for b, h, length in _heads(q, lengths):
            sequence = _sequence((k, v), (null_k, null_v), matrices[b], form, (b, h, length))
            rows = q[b, h].to(wide)
            for stretch in _stretches(length, form, rows):
                cuts = [_cut(x, stretch, form.block, stretch.rows) for x in (rows, out[b, h], lse[b, h, :, None])]
                (first, first_lse), *others = (_attend(cuts[0], softmax) for softmax in sequence.softmaxes(stretch))
                cuts[1].copy_(first + others[0][0] if others else first)
                cuts[2].copy_(first_lse[..., None])
        kept = (None, None) if form.combine == "sum" else (out, lse)  # the two softmaxes of a sum are computed again
        ctx.save_for_backward(q, k, v, hidden, weight, bias, null_k, null_v, *kept)
        ctx.form, ctx.lengths = form, lengths
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        """Gradients of all tensors."""
        q, k, v, hidden, weight, bias, null_k, null_v, out, lse = ctx.saved_tensors
        form, lengths = ctx.form, ctx.lengths
        wide = wide_dtype(q)
        with torch.enable_grad():
            factors = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
            matrices = sorting_matrices(BlockScores(*factors), form.sorting, block_counts(lengths, form.block))
        grads = [_room(x, lengths, wide) for x in (q, k, v)]
        null_grads = [None if x is None else torch.zeros_like(x, dtype=wide) for x in (null_k, null_v)]
        matrix_grads = [torch.zeros_like(matrix) for matrix in matrices]
        for b, h, length in _heads(q, lengths):
            sequence = _sequence((k, v), (null_k, null_v), matrices[b].detach(), form, (b, h, length))
            kept = None if lse is None else (out[b, h].to(wide), lse[b, h, :, None])
            given = q[b, h].to(wide), grad_out[b, h].to(wide), kept, grads[0][b, h]
            of_own, of_sorted = _attention_backward(sequence, *given, length)
            of_own, matrix_grads[b][h], of_null = sequence.gradients(of_own, of_sorted)
            for total, own in zip(grads[1:], of_own, strict=True):
                total[b, h, :length] = own[:length]
            for null_grad, own in zip(null_grads, of_null, strict=False):  # without a null key there are no gradients
                if null_grad is not None:
                    null_grad[h] += own
        of_factors = torch.autograd.grad(  # of an empty batch there is no matrix that uses them
            matrices, factors, matrix_grads, allow_unused=True, materialize_grads=True
        )
        narrow = [None if grad is None else grad.to(q.dtype) for grad in (*grads, *null_grads)]
        return *narrow[:3], *of_factors, *narrow[3:], None, None


def _attention_backward(
    sequence: _Sequence, q: Tensor, grad: Tensor, kept: tuple[Tensor, Tensor] | None, grad_q: Tensor, length: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Write the gradient of q (L, E), and return those of own and of sorted keys and values, in whole blocks.

    Args:
        sequence: the keys and values.
        q: (L, E).
        grad: (L, E), gradient of the result.
        kept: result (L, E) and log-sum-exp (L, 1) where there is one softmax.
        grad_q: (L, E).
        length: tokens that are valid.
    """
    form = sequence.form
    of_own, of_sorted = ([_room(x[None, None], [length], x.dtype)[0, 0] for x in sequence.own] for _ in range(2))
    for stretch in _stretches(length, form, q):
        rows, upstream, target = (_cut(x, stretch, form.block, stretch.rows) for x in (q, grad, grad_q))
        for index, softmax in enumerate(sequence.softmaxes(stretch)):
            if kept is None:
                out, lse = _attend(rows, softmax)
            else:
                out, lse = (_cut(x, stretch, form.block, stretch.rows) for x in kept)
                lse = lse[..., 0]
            arguments = upstream, rows, softmax.k, softmax.v, out, lse, q.shape[1] ** -0.5, softmax.bias
            part, *of_both = fused_backward(*arguments, causal=softmax.causal)
            target.add_(part) if index else target.copy_(part)
            for sums, gradient in zip(zip(of_own, of_sorted, strict=True), of_both, strict=True):
                first_sorted = gradient.shape[2] - softmax.others
                _cut(sums[0], stretch, form.block, softmax.own).copy_(gradient[:, :, : softmax.own])
                _cut(sums[1], stretch, form.block, softmax.others).copy_(gradient[:, :, first_sorted:])
    return of_own, of_sorted


def _room(like: Tensor, lengths: list[int], dtype: torch.dtype) -> Tensor:
    """A tensor (B, H, L, ...) to be written: zeros where some rows are left out, else as it comes."""
    full = min(lengths, default=0) == like.shape[2]
    return torch.empty_like(like, dtype=dtype) if full else torch.zeros_like(like, dtype=dtype)


def _stretches(length: int, form: SortedBlocks, like: Tensor) -> Iterator[Stretch]:
    """The whole blocks, as many at a time as keep a call's temporaries in the cache, then what is left."""
    whole, rest = divmod(length, form.block)
    size = max(1, CALL_BYTES // (8 * form.block * like.shape[1] * like.element_size()))  # keys, values, gradients
    for first in range(0, whole, size):
        yield Stretch(first, min(size, whole - first), form.block, form.block)
    if rest:
        yield Stretch(whole, 1, rest, form.block if whole or form.sorting.causal else rest)


def _heads(q: Tensor, lengths: list[int]) -> Iterator[tuple[int, int, int]]:
    """Example, head and length of every sequence that isn't empty."""
    return ((b, h, length) for b, length in enumerate(lengths) if length for h in range(q.shape[1]))


def _sequence(
    kv: tuple[Tensor, Tensor],
    nulls: tuple[Tensor | None, Tensor | None],
    matrices: Tensor,
    form: SortedBlocks,
    where: tuple[int, int, int],
) -> _Sequence:
    b, h, length = where
    wide = wide_dtype(kv[0])
    k, v = (tensor[b, h, :length].to(wide) for tensor in kv)
    null_k, null_v = nulls
    null = None if null_k is None or null_v is None else (null_k[h].to(wide), null_v[h].to(wide))
    return _Sequence(k, v, null, matrices[h], form)


def _attend(q: Tensor, softmax: Softmax) -> tuple[Tensor, Tensor]:
    return fused_forward(q, softmax.k, softmax.v, q.shape[3] ** -0.5, softmax.bias, causal=softmax.causal)
