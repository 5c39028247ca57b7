"""The tensors of a piece, as views in its numbering: whole, and strip by strip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.partial_softmax import stack
from subquad.ops.pattern.piece import Gradients, Work
from subquad.ops.pattern.strips import Numbering, Run


class Unit(NamedTuple):
    """Sequences of equal length, numbered as a piece wants them: one lane of all heads, or all lanes of one head.

    Attributes:
        numbering: of its lanes.
        work: q, out (U, rows, E), lse (U, rows), k, v (U, columns, E).
        gradients: likewise; None in the forward pass.
    """

    numbering: Numbering
    work: Work
    gradients: Gradients | None


def units(numbering: Numbering, work: Work, gradients: Gradients | None) -> Iterator[Unit]:
    """The tensors in the numbering of a piece; what was copied is written back when the next unit is asked for."""
    if numbering.queries is not None or numbering.keys is not None:
        yield from _listed_unit(numbering, work, gradients)
    elif numbering.lanes <= len(work.q):
        for lane in numbering.each_lane():
            yield Unit(lane, *_renumber(lane, work, gradients, _every))
    else:
        for head in range(len(work.q)):
            yield Unit(numbering, *_renumber(numbering, *indexed(work, gradients, head), _lanes))


View = Callable[[Tensor, int, int, Numbering], Tensor]


def _renumber(
    numbering: Numbering, work: Work, gradients: Gradients | None, view: View
) -> tuple[Work, Gradients | None]:
    def rows(x: Tensor) -> Tensor:
        return view(x, numbering.first_query, numbering.rows, numbering)

    def columns(x: Tensor) -> Tensor:
        return view(x, numbering.first_key, numbering.columns, numbering)

    return _mapped(rows, columns, work, gradients)


def _every(x: Tensor, first: int, count: int, numbering: Numbering) -> Tensor:
    """(G, L, ...) -> (G, count, ...), one lane of all heads."""
    return x[:, first : first + numbering.step * (count - 1) + 1 : numbering.step]


def _lanes(x: Tensor, first: int, count: int, numbering: Numbering) -> Tensor:
    """(L, ...) -> (lanes, count, ...), all lanes of one head."""
    stride, *rest = x.stride()
    shape, strides = (numbering.lanes, count, *x.shape[1:]), (stride, numbering.step * stride, *rest)
    return x.as_strided(shape, strides, x.storage_offset() + first * stride)


def _listed_unit(numbering: Numbering, work: Work, gradients: Gradients | None) -> Iterator[Unit]:
    """The listed queries or keys of all heads, copied out and, afterwards, back."""
    queries, keys = (
        None if chosen is None else torch.from_numpy(chosen).to(work.q.device)
        for chosen in (numbering.queries, numbering.keys)
    )
    own, grads = work, gradients
    if keys is not None:
        own = own._replace(k=work.k.index_select(1, keys), v=work.v.index_select(1, keys))
        grads = None if grads is None else grads._replace(k=torch.zeros_like(own.k), v=torch.zeros_like(own.v))
    if queries is not None:
        names = ("q", "out", "lse")
        own = own._replace(**{name: getattr(work, name).index_select(1, queries) for name in names})
        if grads is not None:
            lse = None if grads.lse is None else grads.lse.index_select(1, queries)
            grads = grads._replace(out=grads.out.index_select(1, queries), lse=lse, q=torch.zeros_like(own.q))
    yield Unit(numbering, own, grads)
    if queries is not None and gradients is None:
        work.out.index_copy_(1, queries, own.out)
        work.lse.index_copy_(1, queries, own.lse)
    if gradients is not None and grads is not None:
        if queries is not None:
            gradients.q.index_add_(1, queries, grads.q)
        if keys is not None:
            gradients.k.index_add_(1, keys, grads.k)
            gradients.v.index_add_(1, keys, grads.v)


def stacked(run: Run, part: slice, work: Work, gradients: Gradients | None) -> tuple[Work, Gradients | None]:
    """Views of the strips of a run, (number, U, rows or columns, ...); those of keys may overlap."""

    def rows(x: Tensor) -> Tensor:
        return stack(x, run.row, run.rows, run.number, run.step, part)

    def columns(x: Tensor) -> Tensor:
        return stack(x, run.column, run.columns, run.number, run.step, part)

    return _mapped(rows, columns, work, gradients)


def indexed(work: Work, gradients: Gradients | None, index: int | tuple[slice, int]) -> tuple[Work, Gradients | None]:
    """The same part of all tensors."""
    return _mapped(lambda x: x[index], lambda x: x[index], work, gradients)


def _mapped(
    rows: Callable[[Tensor], Tensor],
    columns: Callable[[Tensor], Tensor],
    work: Work,
    gradients: Gradients | None,
) -> tuple[Work, Gradients | None]:
    """Views of all tensors: one of those with a row for each query, one of those with a row for each key."""
    work = work._replace(q=rows(work.q), k=columns(work.k), v=columns(work.v), out=rows(work.out), lse=rows(work.lse))
    if gradients is None:
        return work, None
    lse = None if gradients.lse is None else rows(gradients.lse)
    return work, Gradients(rows(gradients.out), lse, rows(gradients.q), columns(gradients.k), columns(gradients.v))
