"""Strips of a band: low <= i - j <= high, with i - j a multiple of a step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from subquad.ops.fused import TALL_ROWS
from subquad.ops.pattern.strips import Numbering, Shape, Strips, make_strips
from subquad.patterns.pattern import Indices

EDGE_ROWS = 256
"""Rows up to which cut-off strips at an end of the sequence are made one."""
LOW_ROWS = 64
"""Queries of a strip of a band of middling width, or of one so wide that the mask of a tall strip is too large."""
TALL_PAIRS = 2**22
"""Largest mask of a tall strip, in pairs."""
SLICE_PAIRS = 2**20
"""Largest mask of a slice of all keys, in pairs."""


def lanes_of(shape: Shape, step: int) -> list[Numbering]:
    """Numberings in which distances that are multiples of `step` are distances of 1, in as few as go.

    Residues of equal numbers of queries and keys are lanes of one numbering.
    """
    found: list[Numbering] = []
    for residue in range(min(step, shape.keys)):
        first_query = (residue - shape.offset) % step
        rows = -(-(shape.queries - first_query) // step)
        columns = -(-(shape.keys - residue) // step)
        if rows <= 0 or columns <= 0:
            continue
        last = found[-1] if found else None
        if last is not None and (last.rows, last.columns, last.first_query + last.lanes) == (
            rows,
            columns,
            first_query,
        ):
            found[-1] = Numbering(rows, columns, last.lanes + 1, step, last.first_query, last.first_key)
        else:
            found.append(Numbering(rows, columns, 1, step, first_query, residue))
    return found


def band_strips(numbering: Numbering, low: int, high: int, offset: int, *, sliced: bool) -> Strips:
    """Strips that cover a band, masked where they are wider than it.

    Args:
        numbering: of one residue each.
        low: smallest distance i - j.
        high: largest.
        offset: absolute position of the first query.
        sliced: whether masks may be added later, so that strips must stay small.
    """
    step = numbering.step
    ahead = (offset + numbering.first_query - numbering.first_key) // step  # row u stands at column u + ahead
    nearest, furthest = -(-low // step), high // step
    first = max(0, nearest - ahead)
    end = min(numbering.rows, furthest + numbering.columns - ahead)
    if first >= end:
        nothing = np.zeros(0, dtype=np.int64)
        return make_strips(nothing, nothing, nothing, nothing)
    to_the_start = furthest >= end - 1 + ahead
    to_the_end = nearest <= first + ahead - numbering.columns + 1
    if to_the_start and to_the_end and not sliced:
        return _one_strip(first, end, numbering.columns, causal=False)
    if to_the_start and first + ahead == nearest and end - first <= numbering.columns and not sliced:
        return _one_strip(first, end, end - first, causal=True)
    width = min(furthest, end - 1 + ahead) - max(nearest, first + ahead - numbering.columns + 1) + 1
    rows = _rows_for(width)
    row0 = np.arange(first, end, rows)
    row1 = np.minimum(row0 + rows, end)
    row0, row1 = _join_edges(row0, row1, row0 + ahead - furthest < 0)
    row0, row1 = _join_edges(row0, row1, row1 - 1 + ahead - nearest >= numbering.columns)
    column0 = np.clip(row0 + ahead - furthest, 0, numbering.columns)
    column1 = np.clip(row1 + ahead - nearest, 0, numbering.columns)
    inside = (row0 + ahead - (column1 - 1) >= nearest) & (row1 - 1 + ahead - column0 <= furthest)
    return make_strips(row0, row1, column0, column1, masked=~inside)


def _one_strip(first: int, end: int, columns: int, *, causal: bool) -> Strips:
    row0, row1, column0, column1 = np.array([[first], [end], [0], [columns]])
    return make_strips(row0, row1, column0, column1, causal=causal)


def _rows_for(width: int) -> int:
    """Queries per strip: measured; narrow bands waste least in short strips, wide ones run fastest in tall ones."""
    if width < 192:
        return 32
    return LOW_ROWS if width < 512 else max(LOW_ROWS, min(TALL_ROWS, TALL_PAIRS // width))


def _join_edges(row0: Indices, row1: Indices, cut: NDArray[np.bool_]) -> tuple[Indices, Indices]:
    """One strip of those that an end of the sequence cuts off, as far as these are few rows: fewer calls."""
    if not cut.any() or cut.all():
        return row0, row1
    chosen = np.flatnonzero(cut)
    rows = int(row1[chosen[-1]] - row0[chosen[0]])
    if len(chosen) < 2 or rows > EDGE_ROWS or np.diff(chosen).max() > 1:
        return row0, row1
    keep0, keep1 = np.ones_like(cut), np.ones_like(cut)
    keep0[chosen[1:]] = False
    keep1[chosen[:-1]] = False
    return row0[keep0], row1[keep1]
