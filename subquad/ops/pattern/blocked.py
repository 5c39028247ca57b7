"""The blocked backend of pattern attention: only what is visible is computed, in memory linear in the length.

A pattern is compiled into disjoint pieces, each a few calls of the fused operator; their results are merged exactly by
log-sum-exp, and the merged result and log-sum-exp give each piece its exact share of the gradients. Nothing is kept for
the backward pass but q, k, v, the result and the log-sum-exp.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.large_pages import empty_like, zeros_like
from subquad.ops.pattern.compiler import compile_pattern
from subquad.ops.pattern.example_facts import ExampleFacts, documents_save
from subquad.ops.pattern.piece import Gradients, Piece, Work
from subquad.ops.pattern.request import Facts, Request
from subquad.ops.pattern.sliced import attend_sliced
from subquad.ops.pattern.strips import Shape
from subquad.ops.precision import full_precision, wide_dtype
from subquad.patterns.bands import Causal
from subquad.patterns.expression import write_pattern
from subquad.patterns.pattern import Pattern
from subquad.patterns.tokens import Global
from subquad.receipt import leave_receipt

CALL_FLOPS = 3 * 2**20
"""What starting a call costs, in products of q · k of all heads: with 8 heads of 64, 6,144 pairs of each."""


class HeadPiece(NamedTuple):
    """A piece for some neighbouring heads.

    Attributes:
        head0: first head.
        head1: behind the last head.
        piece: what they run.
        fresh: whether none of its queries stands in an earlier part of the same heads.
    """

    head0: int
    head1: int
    piece: Piece
    fresh: bool


class Plan(NamedTuple):
    """All parts of a pattern.

    Attributes:
        parts: of all heads.
        dense_heads: those for which dense attention in slices costs less.
        empty_heads: those in which nothing is visible.
        complete: whether every query of every head stands in a part that comes fresh to it.
    """

    parts: tuple[HeadPiece, ...]
    dense_heads: tuple[int, ...]
    empty_heads: tuple[int, ...]
    complete: bool


class Example(NamedTuple):
    """What one example runs.

    Attributes:
        parts: each under its own facts.
        offset: absolute position of the first query.
        complete: whether every query is written before anything is merged into it.
    """

    parts: list[tuple[HeadPiece, ExampleFacts]]
    offset: int
    complete: bool


def attend_blocked(
    q: Tensor, k: Tensor, v: Tensor, request: Request, *, with_lse: bool, asked: str = "blocked"
) -> tuple[Tensor, Tensor | None]:
    """Attend; arguments and result as in `pattern_attention_with_lse`, and `asked` for the receipts.

    Without `with_lse` the log-sum-exp may be None. Plans and masks are made on the CPU.
    """
    valid = request.facts.query_valid
    if q.device.type != "cpu":
        request = replace(request, facts=request.facts.to(torch.device("cpu")))
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    shape = replace(_shape(q, k, request.offset(0)), examples=len(q))
    if _saves_nothing(request, shape, asked):
        return attend_sliced(q, k, v, request, shape, with_lse=with_lse)
    examples = _plan_examples(q, k, request)
    out, lse = _BlockedAttention.apply(q, k, v, examples, request.scale)  # pyright: ignore[reportGeneralTypeIssues] - apply has no types
    if valid is None:
        return out, lse
    return out.masked_fill(~valid[:, None, :, None], 0.0), lse.masked_fill(~valid[:, None], -torch.inf)


def _saves_nothing(request: Request, shape: Shape, asked: str) -> bool:
    """Whether dense attention in slices costs less than any plan; leaves a receipt."""
    if 0 in (shape.examples, shape.heads, shape.queries, shape.keys):
        return False
    plan = plan_pattern(request.pattern, shape, sliced=request.facts.anything)
    dense = plan.dense_heads
    if dense and documents_save(request.facts, shape):
        return False
    if dense:
        which = "" if len(dense) == shape.heads else f" in {_name_heads(dense)}"
        leave_receipt(
            "pattern_attention",
            asked=asked,
            ran=f"dense attention in slices of queries{which}",
            reason=f"{shape.queries} queries and {shape.keys} keys are too few for the pattern to save anything",
        )
    return len(dense) == shape.heads


def _shape(q: Tensor, k: Tensor, offset: int) -> Shape:
    num_heads, length, width = q.shape[1:]
    return Shape(num_heads, length, k.shape[2], offset, CALL_FLOPS // max(1, num_heads * width))


def _plan_examples(q: Tensor, k: Tensor, request: Request) -> list[Example]:
    (batch, num_heads, length, width), key_length = q.shape, k.shape[2]
    if 0 in (batch, num_heads, length, key_length, width):
        return []
    examples = []
    for index in range(batch):
        shape, facts = _shape(q, k, request.offset(index)), request.facts.example(index)
        columns, restricting = _seen_columns(facts), ExampleFacts.of(facts)
        of_pattern = restricting if columns is None else restricting.without_keys(columns)
        plan = plan_pattern(request.pattern, shape, sliced=of_pattern.anything)
        if plan.empty_heads and columns is None and length == key_length:
            _leave_word_of_nothing(request.pattern, plan.empty_heads, length)
        parts = [(part, of_pattern) for part in plan.parts]
        if columns is not None:
            parts += [(part, restricting) for part in _column_parts(columns, request.pattern, shape)]
        examples.append(Example(parts, shape.offset, plan.complete and not of_pattern.anything))
    return examples


@lru_cache(maxsize=32)
def plan_pattern(pattern: Pattern, shape: Shape, *, sliced: bool) -> Plan:
    """Compile a pattern for all heads; equal strips of different heads become one part.

    A pure function, remembered because layers ask again with the same arguments.
    """
    resolved = pattern.resolve(shape.keys)
    num_heads = shape.heads
    ranges = _equal_heads(resolved, num_heads)
    plans = [compile_pattern(resolved.of_head(head0), shape, sliced=sliced) for head0, _ in ranges]
    common = set.intersection(*({piece.signature for piece in plan.pieces} - {None} for plan in plans))
    assigned = [(0, num_heads, piece) for piece in plans[0].pieces if piece.signature in common]
    for (head0, head1), plan in zip(ranges, plans, strict=True):
        assigned += [(head0, head1, piece) for piece in plan.pieces if piece.signature not in common]
    covered, written = np.zeros((2, num_heads, shape.queries), dtype=bool)
    parts = []
    for head0, head1, piece in assigned:
        rows = piece.covered(shape.queries)
        fresh = not (covered[head0:head1] & rows).any()
        parts.append(HeadPiece(head0, head1, piece, fresh))
        covered[head0:head1] |= rows
        written[head0:head1] |= rows & fresh
    empty = tuple(np.flatnonzero(~covered.any(axis=1)).tolist())
    dense = [
        head for (head0, head1), plan in zip(ranges, plans, strict=True) if plan.dense for head in range(head0, head1)
    ]
    return Plan(tuple(parts), tuple(head for head in dense if head not in empty), empty, bool(written.all()))


def _equal_heads(pattern: Pattern, num_heads: int) -> list[tuple[int, int]]:
    """Ranges of neighbouring heads that share a pattern."""
    return _equal_neighbours(
        [pattern.of_head(head) for head in range(num_heads)] if pattern.num_heads else num_heads * [0]
    )


def _equal_neighbours(values: Sequence[object]) -> list[tuple[int, int]]:
    """Ranges of equal neighbours."""
    borders = [0, *(at for at in range(1, len(values)) if values[at] != values[at - 1]), len(values)]
    return list(itertools.pairwise(borders))


def _name_heads(heads: tuple[int, ...]) -> str:
    return f"head{'s' if len(heads) > 1 else ''} {', '.join(map(str, heads))}"


def _leave_word_of_nothing(pattern: Pattern, heads: tuple[int, ...], length: int) -> None:
    which = f" in {_name_heads(heads)}" if pattern.num_heads else ""
    leave_receipt(
        "pattern_attention",
        asked=write_pattern(pattern.of_head(heads[0])),
        ran=f"no attention: the result is 0{which}",
        reason=f"none of {length} queries sees a key in it at this length",
    )


def _seen_columns(facts: Facts) -> Tensor | None:
    """Which keys every query of an example sees; None for none."""
    if facts.global_keys is None:
        return None
    columns = facts.global_keys if facts.key_valid is None else facts.global_keys & facts.key_valid
    return columns if bool(columns.any()) else None


def _column_parts(columns: Tensor, pattern: Pattern, shape: Shape) -> Iterator[HeadPiece]:
    """What every query sees besides the pattern; in heads whose pattern is causal, every later query."""
    chosen = Global(columns.nonzero()[:, 0], rows=False).resolve(shape.keys)
    causal = [pattern.of_head(head).causal for head in range(shape.heads)]
    for head0, head1 in _equal_neighbours(causal):
        seen = Causal() & chosen if causal[head0] else chosen
        for piece in compile_pattern(seen, shape, sliced=True).pieces:
            yield HeadPiece(head0, head1, piece, fresh=False)


class _BlockedAttention(torch.autograd.Function):
    """One node of the graph for all pieces."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, examples: list[Example], scale: float
    ) -> tuple[Tensor, Tensor]:
        out = _result_like(q, examples)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide_dtype(q))
        for index, example in enumerate(examples):
            everything = _widened(q[index], k[index], v[index], out[index], lse[index], example, scale)
            for part, facts in example.parts:
                part.piece.forward(_of_heads(everything, part, facts))
            _write_back(out[index], everything.out)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.examples, ctx.scale = examples, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        with full_precision(ctx.saved_tensors[0].device):  # autocast may be on where backward is called
            return *_gradients(ctx, grad_out, grad_lse), None, None


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v."""
    q, k, v, out, lse = ctx.saved_tensors
    grads = _result_like(q, ctx.examples), zeros_like(k), zeros_like(v)
    upstream = torch.zeros_like(out) if grad_out is None else grad_out
    upstream = upstream if upstream.stride(-1) == 1 else upstream.contiguous()
    for index, example in enumerate(ctx.examples):
        finite = lse[index].masked_fill(lse[index] == -torch.inf, 0.0)
        everything = _widened(q[index], k[index], v[index], out[index], finite, example, ctx.scale)
        grad_q, grad_k, grad_v = (grad[index].to(lse.dtype) for grad in grads)
        of_lse = None if grad_lse is None else grad_lse[index]
        gradients = Gradients(upstream[index].to(lse.dtype), of_lse, grad_q, grad_k, grad_v)
        for part, facts in example.parts:
            part.piece.backward(_of_heads(everything, part, facts), _gradients_of_heads(gradients, part))
        for grad, total in zip(grads, (grad_q, grad_k, grad_v), strict=True):
            _write_back(grad[index], total)
    return grads


def _result_like(q: Tensor, examples: list[Example]) -> Tensor:
    """Where one row for each query will stand; zeros where some may stay unwritten."""
    complete = examples and all(example.complete for example in examples)
    return empty_like(q) if complete else zeros_like(q)


def _widened(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, example: Example, scale: float) -> Work:
    """One example in the dtype of its log-sum-exp: the tensors themselves, where that is theirs."""
    q, k, v, out = (tensor.to(lse.dtype) for tensor in (q, k, v, out))
    return Work(q, k, v, out, lse, ExampleFacts.nothing(), example.offset, scale, fresh=False)


def _write_back(tensor: Tensor, widened: Tensor) -> None:
    if widened.dtype != tensor.dtype:
        tensor.copy_(widened)


def _of_heads(work: Work, part: HeadPiece, facts: ExampleFacts) -> Work:
    heads = slice(part.head0, part.head1)
    names = ("q", "k", "v", "out", "lse")
    return work._replace(facts=facts, fresh=part.fresh, **{name: getattr(work, name)[heads] for name in names})


def _gradients_of_heads(gradients: Gradients, part: HeadPiece) -> Gradients:
    heads = slice(part.head0, part.head1)
    lse = None if gradients.lse is None else gradients.lse[heads]
    names = ("out", "q", "k", "v")
    return gradients._replace(lse=lse, **{name: getattr(gradients, name)[heads] for name in names})
