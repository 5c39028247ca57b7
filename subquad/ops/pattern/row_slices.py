"""Slices of queries, each against the keys that a pattern's distances allow it: how dense attention runs in parts."""

from __future__ import annotations

import numpy as np

from subquad.ops.fused import TALL_ROWS
from subquad.ops.pattern.strips import Shape, Strips, make_strips
from subquad.patterns.pattern import UNBOUNDED

MOST_SLICES = 8
"""Beyond, strips that share a call are cheaper in any case."""
CALLS_PER_SLICE = 2.0
"""What each slice after the first costs, in calls: measured. One slice alone needs no node of autograd of our own."""
MASK = 1.1
"""What the mask costs, in multiples of the pairs."""
SHORT = 1.15
"""What rows cost that aren't tall, in multiples of the pairs."""


def row_slices(shape: Shape, low: int, high: int, most_rows: int) -> Strips:
    """The slices that cost least; those that reach no key are left out.

    Args:
        shape: of the problem.
        low: smallest distance i - j that is visible, or `-UNBOUNDED`.
        high: largest, or `UNBOUNDED`.
        most_rows: queries of a slice at most, for the sake of its mask; at least 1.
    """
    numbers = [number for number in (1, 2, 4, MOST_SLICES) if number <= shape.queries]
    sizes = {min(most_rows, -(-shape.queries // number)) for number in numbers}
    return min((_cut(shape, low, high, rows) for rows in sorted(sizes)), key=lambda strips: slices_price(strips, shape))


def slices_price(strips: Strips, shape: Shape) -> float:
    """What slices cost for one head of one example, in pairs of dense attention."""
    rows, columns = strips.row1 - strips.row0, strips.column1 - strips.column0
    pairs = MASK * rows * columns * np.where(rows < TALL_ROWS, SHORT, 1.0) * (1 + 32 / rows + 32 / columns)
    return float(pairs.sum()) + CALLS_PER_SLICE * (len(rows) - 1) * shape.call_pairs / shape.examples


def _cut(shape: Shape, low: int, high: int, rows: int) -> Strips:
    row0 = np.arange(0, shape.queries, rows)
    row1 = np.minimum(row0 + rows, shape.queries)
    column0, column1 = np.zeros_like(row0), np.full_like(row0, shape.keys)
    if high < UNBOUNDED:
        column0 = np.clip(row0 + shape.offset - high, 0, shape.keys)
    if low > -UNBOUNDED:
        column1 = np.clip(row1 + shape.offset - low, 0, shape.keys)
    return make_strips(row0, row1, column0, column1)
