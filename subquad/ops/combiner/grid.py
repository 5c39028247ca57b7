"""Plans over a grid: token i stands in row ⌊i / m⌋ and column i mod m.

Causally, a token attends to the tokens above it in its column and to those up to it in its row (its cross), or to its
row alone (`Rowmajor`); the rest of the past lies in regions.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.combiner.blocks import Blocks, ByPlace
from subquad.ops.combiner.layout import Layout, sizes_by, summaries, tokens
from subquad.ops.combiner.plans import Pairs, Partition, Plan, Region, require_positive
from subquad.ops.combiner.region_pooling import Reduction, others
from subquad.ops.combiner.region_summary import AverageKeySummary, OwnKeySummary, RegionSummary
from subquad.ops.combiner.stream_regions import ColumnsAbove, RowParts, StreamPlan
from subquad.ops.combiner.summarize import Summarize
from subquad.ops.rectangles import Part, View


class Grid(NamedTuple):
    """Whole rows.

    Attributes:
        height: n, rows.
        width: m, columns.
        causal: whether only the past is seen.
    """

    height: int
    width: int
    causal: bool

    @property
    def rows(self) -> View:
        """Every row."""
        return View(0, self.height, self.width, self.width)

    @property
    def columns(self) -> View:
        """Every column."""
        return View(0, self.width, 1, self.height, self.width)

    def own_row(self) -> Part:
        """The own row; causal: up to the token."""
        return Part(self.rows, (tokens(self.rows),), causal=self.causal)

    def own_column(self, summary_offset: int | None = None) -> list[Part]:
        """The other tokens of the own column, or the summaries that stand in their places; causal: those above."""
        if self.height == 1:
            return []
        offset, origin = (0, tokens) if summary_offset is None else (summary_offset, summaries)
        if not self.causal:
            columns = replace(self.columns, first=offset)
            return [Part(self.columns, (origin(columns),), _all_but_one(self.height))]
        above = replace(self.columns, size=self.height - 1)
        rows = replace(above, first=self.width)  # row t + 1 stands at t, so that t sees 0..t
        return [Part(rows, (origin(replace(above, first=offset)),), causal=True)]

    def cells(self, x: Tensor, height: int) -> Tensor:
        """(G, L, E) -> (G, height, m, E), the first rows."""
        return x[:, : height * self.width].unflatten(1, (height, self.width))

    @property
    def pairs_in_rows(self) -> int:
        """Pairs of `own_row`."""
        return self.height * (self.width * (self.width + 1) // 2 if self.causal else self.width**2)

    @property
    def pairs_in_columns(self) -> int:
        """Pairs of `own_column`."""
        pairs = self.height * (self.height - 1)
        return self.width * (pairs // 2 if self.causal else pairs)

    @property
    def used(self) -> int:
        """Rows whose tokens summarise something: causal, those that others follow."""
        return self.height - 1 if self.causal or self.height == 1 else self.height


def _all_but_one(size: int) -> Tensor:
    return ~torch.eye(size, dtype=torch.bool)[None, None]


@dataclass(frozen=True)
class GridPlan(Plan):
    """A plan over a grid.

    Attributes:
        columns: m.
    """

    columns: int

    def __post_init__(self) -> None:
        """Check the width."""
        require_positive(type(self).__name__, "columns", self.columns)

    def unit(self, length: int) -> int:
        """Whole rows."""
        return min(self.columns, length)

    def layout(self, length: int, *, causal: bool) -> Layout:
        """On the grid of this length."""
        width = self.unit(length)
        return self.on_grid(Grid(length // width, width, causal))

    def pairs(self, length: int, *, causal: bool) -> Pairs:
        """On the grid of this length."""
        width = self.unit(length)
        return self.pairs_on_grid(Grid(length // width, width, causal))

    @abstractmethod
    def on_grid(self, grid: Grid) -> Layout:
        """The layout."""

    @abstractmethod
    def pairs_on_grid(self, grid: Grid) -> Pairs:
        """What the parts of the layout add up to."""

    def lines(self, i: int, length: int, *, causal: bool) -> tuple[list[int], list[int], int]:
        """Tokens of the own row, other tokens of the own column, and the end of what is seen."""
        end, (row, column) = i + 1 if causal else length, divmod(i, self.columns)
        in_row = list(range(row * self.columns, min((row + 1) * self.columns, end)))
        return in_row, [j for j in range(column, end, self.columns) if j != i], end


def as_regions(*regions: list[int]) -> list[Region]:
    """Those that aren't empty."""
    return [Region(tuple(region)) for region in regions if region]


@dataclass(frozen=True)
class Vertical(GridPlan):
    """The cross, and each other column as a region; causal: its rows above the token's."""

    def partition(self, i: int, length: int, *, causal: bool) -> Partition:
        """Columns without the token's row, which is direct."""
        in_row, in_column, end = self.lines(i, length, causal=causal)
        end = in_row[0] if causal else end
        columns = ([j for j in range(c, end, self.columns) if j not in in_row] for c in range(self.columns))
        return Partition(in_row + in_column, as_regions(*(x for c, x in enumerate(columns) if c != i % self.columns)))

    def on_grid(self, grid: Grid) -> Layout:
        """One region for every token: what is above it in its column, or everything else in it."""
        (height, width, causal), used = grid, grid.used

        def pool(x: Tensor, reduction: Reduction) -> Tensor:
            cells = grid.cells(x, used)
            return (reduction.running(cells, 1) if causal else others(cells, reduction, 1)).flatten(1, 2)

        parts = [grid.own_row(), *grid.own_column()]
        if height == 1 or width == 1:
            return Layout(0, _nothing, sizes_by(_nothing), [], parts)
        lines = replace(grid.columns, size=used)
        made = Part(lines, (tokens(lines),), None if causal else _all_but_one(height), causal=causal)
        rows = grid.rows.cut(height - used, height)
        parts.append(Part(rows, (summaries(grid.rows.cut(0, used)),), _all_but_one(width)))
        return Layout(used * width, pool, sizes_by(pool), [made], parts)

    def pairs_on_grid(self, grid: Grid) -> Pairs:
        """The cross, and a summary of every other column."""
        cross, others_in_row = grid.pairs_in_rows + grid.pairs_in_columns, grid.used * grid.width * (grid.width - 1)
        return Pairs(cross + others_in_row, grid.pairs_in_columns if grid.width > 1 else 0)

    @property
    def stream(self) -> StreamPlan:
        """The cross, and columns, which every row makes longer."""
        return StreamPlan(self.columns, True, (ColumnsAbove(self.columns),))


@dataclass(frozen=True)
class Horizontal(GridPlan):
    """The cross, and each other row without the token's column as a region; causal: each row above."""

    def partition(self, i: int, length: int, *, causal: bool) -> Partition:
        """Rows without the token's column, which is direct."""
        in_row, in_column, end = self.lines(i, length, causal=causal)
        end, m = in_row[0] if causal else end, self.columns
        rows = ([j for j in range(t, min(t + m, end)) if j % m != i % m] for t in range(0, end, m) if t != in_row[0])
        return Partition(in_row + in_column, as_regions(*rows))

    def on_grid(self, grid: Grid) -> Layout:
        """One region for every token: the others of its row."""
        height, width, used = grid.height, grid.width, grid.used

        def pool(x: Tensor, reduction: Reduction) -> Tensor:
            return others(grid.cells(x, used), reduction, 2).flatten(1, 2)

        parts = [grid.own_row(), *grid.own_column()]
        if height == 1 or width == 1:
            return Layout(0, _nothing, sizes_by(_nothing), [], parts)
        rows = grid.rows.cut(0, used)
        made = Part(rows, (tokens(rows),), _all_but_one(width))
        return Layout(used * width, pool, sizes_by(pool), [made], parts + grid.own_column(0))

    def pairs_on_grid(self, grid: Grid) -> Pairs:
        """The cross, and a summary of every other row."""
        regions = grid.pairs_in_columns if grid.width > 1 else 0
        return Pairs(grid.pairs_in_rows + grid.pairs_in_columns + regions, grid.used * grid.width * (grid.width - 1))

    @property
    def stream(self) -> StreamPlan:
        """The cross, and the others of each row."""
        return StreamPlan(self.columns, True, (RowParts(self.columns, "others"),))


@dataclass(frozen=True)
class Rowmajor(GridPlan):
    """The own row, and each other row as a region; causal: each row above.

    A query in column b asks a row through the row's own token in column b: with the query of that token the row is
    averaged. A token that is missing, at the end of the last row, has query and key 0.

    Attributes:
        columns: m.
        weighted_keys: the key of a region is that average of the row's keys, and else the key of that token.
    """

    weighted_keys: bool = True

    @property
    def region_summary(self) -> RegionSummary:
        """Asked by tokens."""
        return AverageKeySummary() if self.weighted_keys else OwnKeySummary()

    def check_summarize(self, summarize: Summarize) -> None:
        """Nothing is pooled."""
        if (summarize.reduce, summarize.activation) != ("max", "identity"):
            raise ValueError(f"combiner_attention: {self} pools nothing; leave reduce and activation as they are")

    def partition(self, i: int, length: int, *, causal: bool) -> Partition:
        """By rows."""
        in_row, _, end = self.lines(i, length, causal=causal)
        end, m = in_row[0] if causal else end, self.columns
        starts = [t for t in range(0, end, m) if t != in_row[0]]
        return Partition(in_row, [Region(tuple(range(t, min(t + m, end))), t + i % m) for t in starts])

    def on_grid(self, grid: Grid) -> Layout:
        """One summary for every token, of its whole row."""
        width, used = grid.width, grid.used

        def sizes(kept: Tensor) -> Tensor:
            return grid.cells(kept, used).sum(dim=2, keepdim=True).expand(-1, -1, width, -1).flatten()

        rows = grid.rows.cut(0, used)
        made = [Part(rows, (tokens(rows),))] if used else []
        return Layout(used * width, _nothing, sizes, made, [], Blocks(grid.height, width, grid.causal, ByPlace()))

    def pairs_on_grid(self, grid: Grid) -> Pairs:
        """The own row, and a summary of every other row, for which its tokens ask as they do for themselves."""
        of_rows = grid.pairs_in_rows
        shared = of_rows // grid.height * grid.used
        return Pairs(of_rows + grid.pairs_in_columns, grid.used * grid.width**2, shared)

    @property
    def stream(self) -> StreamPlan:
        """Of earlier rows summaries are enough."""
        return StreamPlan(self.columns, False, (RowParts(self.columns, "all"),), needs_all=False)


def _nothing(x: Tensor, reduction: Reduction) -> Tensor:
    return x[:, :0]
