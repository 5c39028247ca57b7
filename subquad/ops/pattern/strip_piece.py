"""Strips that run: batches of rectangles, as overlapping views of q, k and v."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subquad.ops.fused import fused_backward, fused_forward, lse_backward
from subquad.ops.pattern.strips import Numbering, Run, Strips
from subquad.ops.piece import CALL_BYTES, Bias, Gradients, Piece, Work, add_stack, make_bias, merge, share_out, stack
from subquad.patterns.pattern import Pattern, Tile


class Unit(NamedTuple):
    """Sequences of equal length, numbered as a piece wants them: heads, or the lanes of one head.

    Attributes:
        work: q, out (U, rows, E), lse (U, rows), k, v (U, columns, E).
        gradients: likewise; None in the forward pass.
    """

    work: Work
    gradients: Gradients | None


@dataclass(frozen=True)
class StripPiece(Piece):
    """Part of a pattern in strips.

    Attributes:
        numbering: of queries and keys.
        strips: what is computed.
        predicate: what is visible inside masked strips, in absolute positions.
        invariant: whether the predicate depends on the distance of query and key alone.
    """

    numbering: Numbering
    strips: Strips
    predicate: Pattern
    invariant: bool
    _shared_biases: dict[tuple[Run, torch.dtype], Bias] = field(default_factory=dict, repr=False, compare=False)

    @property
    def empty(self) -> bool:
        """Whether there are no strips."""
        return len(self.strips.row0) == 0

    def price(self, call_pairs: int) -> float:
        """Small strips run less efficiently, masks and calls cost something too."""
        strips = self.strips
        rows, columns = strips.row1 - strips.row0, strips.column1 - strips.column0
        pairs = rows * columns * np.where(strips.causal, 0.6, 1.0) * (1 + 32 / rows + 32 / columns)
        masks = 1.0 if self.invariant else 1 + 0.15 * strips.masked
        return self.numbering.lanes * float((pairs * masks).sum()) + call_pairs * len(self.runs)

    @cached_property
    def runs(self) -> list[Run]:
        """The strips in runs."""
        return self.strips.runs()

    @property
    def signature(self) -> Hashable:
        """Strips without lists; the predicate matters only where something is masked."""
        numbering, strips = self.numbering, self.strips
        if numbering.queries is not None or numbering.keys is not None:
            return None
        return numbering, strips.signature, self.predicate if strips.masked.any() else None

    def covered(self, length: int) -> NDArray[np.bool_]:
        """The rows of all strips, in all lanes."""
        edges = np.zeros(self.numbering.rows + 1, dtype=np.int64)
        np.add.at(edges, self.strips.row0, 1)
        np.add.at(edges, self.strips.row1, -1)
        rows = np.flatnonzero(edges[:-1].cumsum() > 0)
        covered = np.zeros(length, dtype=bool)
        lanes = np.arange(self.numbering.lanes)[:, None] if self.numbering.queries is None else 0
        covered[self.numbering.query(rows) + lanes] = True
        return covered

    def without_hidden(self, rest: Pattern, offset: int) -> StripPiece:
        """Drop the strips in which `rest` shows nothing, and mask those in which it doesn't show everything."""
        strips, numbering = self.strips, self.numbering
        spread = numbering.lanes - 1
        classes = rest.tiles(
            numbering.query(strips.row0) + offset,
            numbering.query(strips.row1 - 1) + spread + offset,
            numbering.key(strips.column0),
            numbering.key(strips.column1 - 1) + spread,
        )
        masked = strips.masked | ((classes != Tile.FULL) & ~strips.causal)
        strips = replace(strips, masked=masked)[classes != Tile.EMPTY]
        return StripPiece(numbering, strips, self.predicate, self.invariant)

    def forward(self, work: Work) -> None:
        """One call of the fused operator for each cut of a run."""
        for unit in _units(self.numbering, work, None):
            for run, bias in self._cuts(work, len(unit.work.q)):
                _forward_run(run, bias, unit.work)

    def backward(self, work: Work, gradients: Gradients) -> None:
        """As `forward`; the masks are made again."""
        for unit in _units(self.numbering, work, gradients):
            assert unit.gradients is not None
            for run, bias in self._cuts(work, len(unit.work.q)):
                _backward_run(run, bias, unit.work, unit.gradients)

    def _cuts(self, work: Work, sequences: int) -> Iterator[tuple[Run, Bias | None]]:
        """Runs cut so that a call's temporaries stay in the cache, each with its mask."""
        restricted = work.facts.anything
        runs = work.facts.restrict(self.strips, self.numbering).runs() if restricted else self.runs
        for run in runs:
            own_mask = run.restricted or (run.masked and not self.invariant)
            elements = (run.rows + 2 * run.columns) * work.q.shape[-1]
            elements += run.rows * run.columns * self.numbering.lanes if own_mask else 0
            shared = self._shared_bias(run, work) if run.masked and not own_mask else None
            for part in share_out(run.number, CALL_BYTES // (elements * work.q.element_size())):
                cut = run.cut(part)
                yield cut, self._bias(cut, work) if own_mask else shared

    def _shared_bias(self, run: Run, work: Work) -> Bias:
        """The one small mask of all strips of a run of distances, kept with the piece."""
        key = run._replace(number=1, step=0), work.q.dtype
        if key not in self._shared_biases:
            self._shared_biases[key] = self._bias(key[0], work)
        return self._shared_biases[key]

    def _bias(self, run: Run, work: Work) -> Bias:
        """The mask of the strips of a run; (n, lanes or 1, rows, columns)."""
        numbering = self.numbering
        lanes = numbering.lanes if not self.invariant or run.restricted else 1
        clear = 0 if run.restricted else run.clear
        strip = run.step * torch.arange(run.number)[:, None, None, None]
        lane = torch.arange(lanes)[:, None, None]
        row = run.row + strip + torch.arange(run.rows)[:, None]
        column = run.column + strip + torch.arange(clear, run.columns)
        query = _place(row, lane, numbering.first_query, numbering.step, numbering.queries)
        key = _place(column, lane, numbering.first_key, numbering.step, numbering.keys)
        visible = self.predicate.visible(query + work.offset, key)
        allowed = work.facts.visible(query, key) if run.restricted else None
        return make_bias(visible if allowed is None else visible & allowed, work.q.dtype, clear)


def _place(index: Tensor, lane: Tensor, first: int, step: int, chosen: np.ndarray | None) -> Tensor:
    return first + lane + step * index if chosen is None else torch.from_numpy(chosen)[index]


def _units(numbering: Numbering, work: Work, gradients: Gradients | None) -> Iterator[Unit]:
    """The tensors in the numbering of a piece; what was copied is written back when the next unit is asked for."""
    if numbering.queries is not None or numbering.keys is not None:
        yield from _listed_unit(numbering, work, gradients)
    elif numbering.lanes == 1:
        yield Unit(*_renumber(numbering, work, gradients, _every))
    else:
        for head in range(len(work.q)):
            yield Unit(*_renumber(numbering, *_of_head(work, gradients, head), _lanes))


def _of_head(work: Work, gradients: Gradients | None, head: int) -> tuple[Work, Gradients | None]:
    work = work._replace(**{name: getattr(work, name)[head] for name in ("q", "k", "v", "out", "lse")})
    if gradients is not None:
        lse = None if gradients.lse is None else gradients.lse[head]
        names = ("out", "q", "k", "v")
        gradients = gradients._replace(lse=lse, **{name: getattr(gradients, name)[head] for name in names})
    return work, gradients


View = Callable[[Tensor, int, int, Numbering], Tensor]


def _renumber(
    numbering: Numbering, work: Work, gradients: Gradients | None, view: View
) -> tuple[Work, Gradients | None]:
    def rows(x: Tensor) -> Tensor:
        return view(x, numbering.first_query, numbering.rows, numbering)

    def columns(x: Tensor) -> Tensor:
        return view(x, numbering.first_key, numbering.columns, numbering)

    work = work._replace(q=rows(work.q), k=columns(work.k), v=columns(work.v), out=rows(work.out), lse=rows(work.lse))
    if gradients is None:
        return work, None
    lse = None if gradients.lse is None else rows(gradients.lse)
    return work, Gradients(rows(gradients.out), lse, rows(gradients.q), columns(gradients.k), columns(gradients.v))


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
        None if chosen is None else torch.from_numpy(chosen) for chosen in (numbering.queries, numbering.keys)
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
    yield Unit(own, grads)
    if queries is not None and gradients is None:
        work.out.index_copy_(1, queries, own.out)
        work.lse.index_copy_(1, queries, own.lse)
    if gradients is not None and grads is not None:
        if queries is not None:
            gradients.q.index_add_(1, queries, grads.q)
        if keys is not None:
            gradients.k.index_add_(1, keys, grads.k)
            gradients.v.index_add_(1, keys, grads.v)


def _forward_run(run: Run, bias: Bias | None, work: Work) -> None:
    for part in _sequences(run, len(work.q), work.q):
        q, out = (stack(x[part], run.row, run.rows, run.number, run.step) for x in (work.q, work.out))
        k, v = (stack(x[part], run.column, run.columns, run.number, run.step) for x in (work.k, work.v))
        lse = stack(work.lse[part], run.row, run.rows, run.number, run.step)
        chosen = _of_sequences(bias, part)
        part_out, part_lse = fused_forward(
            q, k, v, work.scale, None if chosen is None else chosen.values, causal=run.causal
        )
        if chosen is not None and chosen.hidden_rows is not None:
            part_lse = part_lse.masked_fill(chosen.hidden_rows, -torch.inf)
        merge(out, lse, part_out, part_lse, fresh=work.fresh)


def _backward_run(run: Run, bias: Bias | None, work: Work, gradients: Gradients) -> None:
    for part in _sequences(run, len(work.q), work.q):
        q, out, grad = (
            stack(x[part], run.row, run.rows, run.number, run.step) for x in (work.q, work.out, gradients.out)
        )
        k, v = (stack(x[part], run.column, run.columns, run.number, run.step) for x in (work.k, work.v))
        lse = stack(work.lse[part], run.row, run.rows, run.number, run.step)
        chosen = _of_sequences(bias, part)
        values = None if chosen is None else chosen.values
        grad_lse = (
            None if gradients.lse is None else stack(gradients.lse[part], run.row, run.rows, run.number, run.step)
        )
        grad_q, grad_k, grad_v = fused_backward(grad, q, k, v, out, lse, work.scale, values, causal=run.causal)
        if grad_lse is not None:
            more_q, more_k = lse_backward(grad_lse, q, k, lse, work.scale, values, causal=run.causal)
            grad_q, grad_k = grad_q + more_q, grad_k + more_k
        rows = stack(gradients.q[part], run.row, run.rows, run.number, run.step)
        rows.copy_(grad_q) if work.fresh else rows.add_(grad_q)
        add_stack(gradients.k[part], grad_k, run.column, run.step)
        add_stack(gradients.v[part], grad_v, run.column, run.step)


def _sequences(run: Run, count: int, like: Tensor) -> Iterator[slice]:
    """Ranges of sequences for one call each: one where a run is long, more where it is short."""
    elements = run.number * (run.rows + 2 * run.columns) * like.shape[-1]
    return share_out(count, CALL_BYTES // (elements * like.element_size()))


def _of_sequences(bias: Bias | None, part: slice) -> Bias | None:
    if bias is None or bias.values.shape[1] == 1:
        return bias
    return Bias(bias.values[:, part], None if bias.hidden_rows is None else bias.hidden_rows[:, part])
