"""The mixture of two plans over a grid, as the official code has it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subquad.ops.combiner.grid import Grid, GridPlan, Vertical, as_regions
from subquad.ops.combiner.layout import Layout, sizes_by, tokens
from subquad.ops.combiner.plans import Pairs, Partition
from subquad.ops.combiner.region_pooling import Reduction, after, before
from subquad.ops.combiner.stream_regions import ColumnsAbove, RowParts, StreamPlan
from subquad.ops.rectangles import Part


@dataclass(frozen=True)
class JointMixture(GridPlan):
    """The official mixture, causal alone: the cross, the regions of `Vertical`, and those of `Horizontal` in two parts.

    What is off the cross stands in two regions, one of its column and one of its row left or right of the token's
    column; all share one softmax.
    """

    bidirectional = False

    def partition(self, i: int, length: int, *, causal: bool) -> Partition:
        """Columns above the token's row, and rows left and right of its column."""
        (direct, columns), m = Vertical(self.columns).partition(i, length, causal=True), self.columns
        starts = range(0, i - i % m, m)
        left = as_regions(*(list(range(t, t + i % m)) for t in starts))
        right = as_regions(*(list(range(t + i % m + 1, t + m)) for t in starts))
        return Partition(direct, columns + left + right)

    def on_grid(self, grid: Grid) -> Layout:
        """Three regions for every token but those of the last row."""
        width, used = grid.width, grid.used
        vertical = Vertical(width).on_grid(grid)
        if not vertical.regions:
            return vertical

        def pool(x: Tensor, reduction: Reduction) -> Tensor:
            cells = grid.cells(x, used)
            sides = (before(cells, reduction, 2), after(cells, reduction, 2))
            return torch.cat((vertical.pool(x, reduction), *(side.flatten(1, 2) for side in sides)), dim=1)

        made, parts, rows = list(vertical.summaries), list(vertical.parts), grid.rows.cut(0, used)
        square = torch.ones(1, 1, width, width, dtype=torch.bool)
        for side, first, visible in ((1, 1, square.tril(-1)), (2, 0, square.triu(1))):
            offset = side * used * width
            made.append(Part(replace(rows, first=offset), (tokens(rows),), visible))
            (part,) = grid.own_column(offset)  # without the first column, or the last, where a side has nothing
            keys = tuple(keys._replace(rows=keys.rows.cut(first, first + width - 1)) for keys in part.keys)
            parts.append(Part(part.rows.cut(first, first + width - 1), keys, causal=True))
        return Layout(3 * used * width, pool, sizes_by(pool), made, parts)

    def pairs_on_grid(self, grid: Grid) -> Pairs:
        """Those of `Vertical`, and two summaries of every row above, one at the borders."""
        attended, summarised, _ = Vertical(grid.width).pairs_on_grid(grid)
        sides = (grid.width - 1) * grid.height * (grid.height - 1)
        return Pairs(attended + sides, summarised + grid.used * grid.width * (grid.width - 1))

    @property
    def stream(self) -> StreamPlan:
        """The cross, columns, and both sides of each row."""
        sides = RowParts(self.columns, "left"), RowParts(self.columns, "right")
        return StreamPlan(self.columns, True, (ColumnsAbove(self.columns), *sides))
