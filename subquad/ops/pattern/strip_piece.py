"""Strips that run: batches of rectangles, as overlapping views of q, k and v."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subquad.ops.fused import fused_backward, fused_forward, lse_backward
from subquad.ops.partial_softmax import CALL_BYTES, Bias, add_stack, make_bias, merge, share_out
from subquad.ops.pattern.piece import Gradients, Piece, Work
from subquad.ops.pattern.strip_views import indexed, stacked, units
from subquad.ops.pattern.strips import Numbering, Run, Shape, Strips
from subquad.ops.pattern.triangles import triangles_backward, triangles_forward, triangles_pay
from subquad.ops.pattern.unfused import add_unfused, unfused_pays
from subquad.patterns.pattern import Pattern, Tile

TALL_ROWS = 256
"""Rows to which strips are joined in the backward pass, where large products are faster than the fused operator."""
MOST_JOINED_PAIRS = 1.4
"""How many times as many pairs that may compute: what the products gain."""

STRIPS_PER_THREAD = 4
"""Strips of a run from which on a call takes one sequence alone."""

BiasKey = tuple[Run, torch.dtype, torch.device]


@dataclass(frozen=True)
class StripPiece(Piece):
    """Part of a pattern in strips.

    Attributes:
        numbering: of queries and keys.
        strips: what is computed.
        predicate: what is visible inside masked strips, in absolute positions.
        invariant: whether the predicate depends on the distance of query and key alone.
        joinable: whether the predicate also hides what strips around several of these would show beyond them.
        corner: what the rows of a masked strip see behind the columns that all of them see, from the first on; None
            where strips differ in that.
    """

    numbering: Numbering
    strips: Strips
    predicate: Pattern
    invariant: bool
    joinable: bool = False
    corner: NDArray[np.bool_] | None = None
    _shared_biases: dict[BiasKey, Bias] = field(default_factory=dict, repr=False, compare=False)

    @property
    def empty(self) -> bool:
        """Whether there are no strips."""
        return len(self.strips.row0) == 0

    def price(self, shape: Shape) -> float:
        """Small strips run less efficiently, masks and calls cost something too."""
        strips = self.strips
        rows, columns = strips.row1 - strips.row0, strips.column1 - strips.column0
        alone = np.minimum(1.0, 0.5 + 256 / rows)  # the operator leaves out only what is 512 keys behind the diagonal
        of_causal = 0.6 if triangles_pay(int(strips.causal.sum()), int(rows.max(initial=0))) else alone
        pairs = rows * columns * np.where(strips.causal, of_causal, 1.0) * (1 + 32 / rows + 32 / columns)
        masks = 1.0 if self.invariant else 1 + 0.15 * strips.masked
        calls = sum(_count_calls(run, self.numbering, shape.heads) for run in self.runs)
        return self.numbering.lanes * float((pairs * masks).sum()) + shape.call_pairs * calls

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
        return replace(self, strips=strips, _shared_biases={})

    def forward(self, work: Work) -> None:
        """One call of the fused operator for each cut of a run."""
        for unit in units(self.numbering, work, None):
            for run, bias in self._cuts(work, self._runs(work), unit.numbering):
                _forward_run(run, bias, unit.work)

    def backward(self, work: Work, gradients: Gradients) -> None:
        """As `forward`; the masks are made again."""
        for unit in units(self.numbering, work, gradients):
            assert unit.gradients is not None
            runs = [tall for run in self._runs(work) for tall in self._joined(run, unit.work.q)]
            for run, bias in self._cuts(work, runs, unit.numbering):
                by_products = self._pays_unfused(run, unit.work.q)
                backward_run = _backward_unfused if by_products else _backward_fused
                backward_run(run, bias, unit.work, unit.gradients)

    def _runs(self, work: Work) -> list[Run]:
        """The strips in runs, under the facts of an example."""
        return work.facts.restrict(self.strips, self.numbering).runs() if work.facts.anything else self.runs

    def _joined(self, run: Run, like: Tensor) -> list[Run]:
        """A run with its strips joined, where these are then large enough for products of matrices."""
        joined = run.joined(TALL_ROWS) if self.joinable and not run.restricted else [run]
        tall = joined[0]
        cheap = tall.columns <= MOST_JOINED_PAIRS * run.columns
        return joined if cheap and self._pays_unfused(tall, like) else [run]

    def _pays_unfused(self, run: Run, like: Tensor) -> bool:
        """Whether products are faster; to make a mask for them each time costs what they gain."""
        return not (run.causal or self._has_own_mask(run)) and unfused_pays(run.rows, run.columns, like)

    def _has_own_mask(self, run: Run) -> bool:
        return run.restricted or (run.masked and not self.invariant and self.corner is None)

    def _cuts(self, work: Work, runs: list[Run], numbering: Numbering) -> Iterator[tuple[Run, Bias | None]]:
        """Runs cut so that a call's temporaries stay in the cache, each with its mask."""
        for run in runs:
            own_mask = self._has_own_mask(run)
            elements = (run.rows + 2 * run.columns) * work.q.shape[-1]
            elements += run.rows * run.columns * numbering.lanes if own_mask else 0
            shared = self._shared_bias(run, work, numbering) if run.masked and not own_mask else None
            for part in share_out(run.number, CALL_BYTES // (elements * work.q.element_size())):
                cut = run.cut(part)
                yield cut, self._bias(cut, work, numbering) if own_mask else shared

    def _shared_bias(self, run: Run, work: Work, numbering: Numbering) -> Bias:
        """The mask of all strips of a run of distances, or of runs with the same corner; kept with the piece."""
        if self.corner is not None:
            return self._corner_bias(self.corner, run, work.q)
        key = run._replace(number=1, step=0), work.q.dtype, work.q.device
        if key not in self._shared_biases:
            self._shared_biases[key] = self._cut_bias(run, work, numbering)
        return self._shared_biases[key]

    def _cut_bias(self, run: Run, work: Work, numbering: Numbering) -> Bias:
        """Part of the mask of all strips of so many rows, which differ in where the sequence cuts them off."""
        first = int((self.strips.column0 - self.strips.row0).min())
        columns = int((self.strips.column1 - self.strips.row1).max()) + run.rows - first
        whole = Run(1, 0, first, run.rows, columns, 0, masked=True, causal=False, restricted=False, clear=0)
        key = whole, work.q.dtype, work.q.device
        if key not in self._shared_biases:
            self._shared_biases[key] = self._bias(whole, work, numbering)
        start = run.column - run.row - first
        values = self._shared_biases[key].values[..., start : start + run.columns]
        hidden = values.isneginf().all(dim=-1)
        return Bias(values, hidden if bool(hidden.any()) else None)

    def _corner_bias(self, corner: NDArray[np.bool_], run: Run, like: Tensor) -> Bias:
        """Part of the mask of the widest run."""
        widest = max(self.runs, key=lambda run: run.clear)
        key = widest._replace(number=1, step=0), like.dtype, like.device
        if key not in self._shared_biases:
            visible = torch.from_numpy(corner)[None, None]
            self._shared_biases[key] = make_bias(visible, like.dtype, widest.clear).to(like.device, like.dtype)
        values, first = self._shared_biases[key].values, widest.clear - run.clear
        return Bias(values[:, :, : run.rows, first : first + run.columns], None)

    def _bias(self, run: Run, work: Work, numbering: Numbering) -> Bias:
        """The mask of the strips of a run; (n, lanes or 1, rows, columns)."""
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
        visible = visible if allowed is None else visible & allowed
        return make_bias(visible, work.q.dtype, clear).to(work.q.device, work.q.dtype)


def _place(index: Tensor, lane: Tensor, first: int, step: int, chosen: np.ndarray | None) -> Tensor:
    return first + lane + step * index if chosen is None else torch.from_numpy(chosen)[index]


def _forward_run(run: Run, bias: Bias | None, work: Work) -> None:
    for part in _sequences(run, len(work.q), work.q):
        own, _ = stacked(run, part, work, None)
        if _runs_as_triangles(run, part):
            triangles_forward(indexed(own, None, (slice(None), 0))[0])
            continue
        chosen = _of_sequences(bias, part)
        values = None if chosen is None else chosen.values
        part_out, part_lse = fused_forward(own.q, own.k, own.v, work.scale, values, causal=run.causal)
        if chosen is not None and chosen.hidden_rows is not None:
            part_lse = part_lse.masked_fill(chosen.hidden_rows, -torch.inf)
        merge(own.out, own.lse, part_out, part_lse, fresh=work.fresh)


def _backward_fused(run: Run, bias: Bias | None, work: Work, gradients: Gradients) -> None:
    for part in _sequences(run, len(work.q), work.q):
        own, grads = stacked(run, part, work, gradients)
        assert grads is not None
        if _runs_as_triangles(run, part):
            own_blocks, grads_of_blocks = indexed(own, grads, (slice(None), 0))
            assert grads_of_blocks is not None
            triangles_backward(own_blocks, grads_of_blocks)
            continue
        chosen = _of_sequences(bias, part)
        values = None if chosen is None else chosen.values
        grad_q, grad_k, grad_v = fused_backward(
            grads.out, own.q, own.k, own.v, own.out, own.lse, work.scale, values, causal=run.causal
        )
        if grads.lse is not None:
            more_q, more_k = lse_backward(grads.lse, own.q, own.k, own.lse, work.scale, values, causal=run.causal)
            grad_q, grad_k = grad_q + more_q, grad_k + more_k
        grads.q.copy_(grad_q) if work.fresh else grads.q.add_(grad_q)
        add_stack(gradients.k[part], grad_k, run.column, run.step)
        add_stack(gradients.v[part], grad_v, run.column, run.step)


def _backward_unfused(run: Run, bias: Bias | None, work: Work, gradients: Gradients) -> None:
    visible = None if bias is None else bias.values[:, 0].eq(0).to(bias.values.dtype).mT.contiguous()
    own, grads = stacked(run, slice(None), work, gradients)
    for sequence in range(len(work.q)):
        own_part, grads_part = indexed(own, grads, (slice(None), sequence))
        assert grads_part is not None
        add_unfused(own_part, grads_part, visible)


def _runs_as_triangles(run: Run, part: slice) -> bool:
    """Whether a call of one sequence takes batched products."""
    return run.causal and part.stop - part.start == 1 and triangles_pay(run.number, run.rows)


def _count_calls(run: Run, numbering: Numbering, heads: int) -> int:
    """How many calls `_sequences` makes of a run, in all units, as long as its size asks for no more."""
    sequences = heads if numbering.lanes <= heads else numbering.lanes
    calls = sequences if _stands_alone(run) else 1
    return calls * min(heads, numbering.lanes)


def _sequences(run: Run, count: int, like: Tensor) -> Iterator[slice]:
    """Ranges of sequences for one call each: one where a run has strips enough for all threads, else more.

    The gradients of several stand between each other, row by row, which slows the operator down.
    """
    if _stands_alone(run):
        yield from (slice(start, start + 1) for start in range(count))
        return
    elements = run.number * (run.rows + 2 * run.columns) * like.shape[-1]
    yield from share_out(count, CALL_BYTES // (elements * like.element_size()))


def _stands_alone(run: Run) -> bool:
    return run.number >= STRIPS_PER_THREAD * torch.get_num_threads()


def _of_sequences(bias: Bias | None, part: slice) -> Bias | None:
    if bias is None or bias.values.shape[1] == 1:
        return bias
    return Bias(bias.values[:, part], None if bias.hidden_rows is None else bias.hidden_rows[:, part])
