"""Strips: rectangles of consecutive queries against consecutive keys, the form into which patterns are compiled.

A piece of a pattern renumbers queries and keys so that what a query sees becomes consecutive: a stride becomes a
window when positions of equal residue stand together, summary columns become consecutive when only they are listed.
Equal strips at equal distances are one batch for the fused operator, as overlapping views that copy nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from subquad.patterns.pattern import Indices


@dataclass(frozen=True)
class Shape:
    """The size of a problem.

    Attributes:
        heads: H.
        queries: L.
        keys: S.
        offset: absolute position of the first query.
        call_pairs: what starting a call costs a head, in pairs of dense attention.
        examples: how many share the calls of dense attention in slices; pieces are called for each one.
    """

    heads: int
    queries: int
    keys: int
    offset: int
    call_pairs: int
    examples: int = 1


@dataclass(frozen=True)
class Numbering:
    """How a piece numbers queries and keys.

    Lane a, row u is query `first_query + a + step * u`, column c is key `first_key + a + step * c`; where a list is
    given instead, row u is query `queries[u]`, column c is key `keys[c]`.

    Attributes:
        rows: queries of a lane.
        columns: keys of a lane.
        lanes: independent sequences of equal length.
        step: distance of neighbours in a lane.
        first_query: of lane 0.
        first_key: of lane 0.
        queries: list of queries, ascending, instead.
        keys: list of keys, ascending, instead.
    """

    rows: int
    columns: int
    lanes: int = 1
    step: int = 1
    first_query: int = 0
    first_key: int = 0
    queries: Indices | None = None
    keys: Indices | None = None

    def query(self, row: Indices) -> Indices:
        """The query in a row of lane 0."""
        return self.first_query + self.step * row if self.queries is None else self.queries[row]

    def key(self, column: Indices) -> Indices:
        """The key in a column of lane 0."""
        return self.first_key + self.step * column if self.keys is None else self.keys[column]

    def column(self, key: Indices) -> Indices:
        """The first column of lane 0 whose key isn't before this one, be it outside of the sequence."""
        if self.keys is not None:
            return np.searchsorted(self.keys, key)
        return -(-(key - self.first_key) // self.step)

    def each_lane(self) -> Iterator[Numbering]:
        """The numbering of every lane alone."""
        for lane in range(self.lanes):
            yield replace(self, lanes=1, first_query=self.first_query + lane, first_key=self.first_key + lane)


class Run(NamedTuple):
    """Equal strips at equal distances.

    Attributes:
        number: of strips.
        row: first row of the first strip.
        column: first column of the first strip.
        rows: rows of each.
        columns: columns of each.
        step: from strip to strip, in rows and in columns.
        masked: whether the pattern doesn't show everything in the strips.
        causal: row t of each strip sees its columns 0..t.
        restricted: whether facts about the example hide something in the strips.
        clear: how many of the first columns the pattern shows to all rows, though the strips are masked.
    """

    number: int
    row: int
    column: int
    rows: int
    columns: int
    step: int
    masked: bool
    causal: bool
    restricted: bool
    clear: int

    def cut(self, part: slice) -> Run:
        """Some of the strips."""
        start, number = part.start, part.stop - part.start
        return self._replace(number=number, row=self.row + start * self.step, column=self.column + start * self.step)

    def joined(self, rows: int) -> list[Run]:
        """Neighbours as strips of `rows` rows, or somewhat fewer, around them, masked; those left over as they are."""
        together = rows // self.rows
        if self.step != self.rows or together < 2 or self.number < together:
            return [self]
        number, step = self.number // together, together * self.step
        columns = self.columns + step - self.step
        tall = self._replace(number=number, rows=step, columns=columns, step=step, masked=True)
        rest = self.cut(slice(number * together, self.number))
        return [tall, rest] if rest.number else [tall]


@dataclass(frozen=True)
class Strips:
    """Strips in ascending order; no row stands in two of them. All attributes have shape (N,).

    Attributes:
        row0: first row.
        row1: behind the last row.
        column0: first column.
        column1: behind the last column.
        masked: whether the pattern doesn't show everything.
        causal: whether row t sees columns 0..t and nothing else.
        restricted: whether facts about the example hide something.
        clear: how many of the first columns the pattern shows to all rows.
    """

    row0: Indices
    row1: Indices
    column0: Indices
    column1: Indices
    masked: NDArray[np.bool_]
    causal: NDArray[np.bool_]
    restricted: NDArray[np.bool_]
    clear: Indices

    def __getitem__(self, chosen: NDArray[np.bool_] | Indices) -> Strips:
        """Some of the strips."""
        return Strips(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    @property
    def signature(self) -> bytes:
        """Equal for equal strips."""
        return b"|".join(getattr(self, name).tobytes() for name in self.__dataclass_fields__)

    def runs(self) -> list[Run]:
        """Equal neighbours at equal distances together."""
        sizes = self.row1 - self.row0, self.column1 - self.column0
        fields = (*sizes, self.masked, self.causal, self.restricted, self.clear)
        skew = self.row0 - self.column0  # equal inside a run, so that one mask of distances serves all its strips
        count, found, start = len(self.row0), [], 0
        same = np.ones(max(count - 1, 0), dtype=bool)
        for field in (*fields, skew):
            same &= field[1:] == field[:-1]
        steps = np.diff(self.row0)
        while start < count:
            end = start + 1
            while end < count and same[end - 1] and steps[end - 1] == steps[start]:
                end += 1
            rows, columns, masked, causal, restricted, clear = (field[start].item() for field in fields)
            step = int(steps[start]) if end - start > 1 else 0
            row, column = int(self.row0[start]), int(self.column0[start])
            found.append(Run(end - start, row, column, rows, columns, step, masked, causal, restricted, clear))
            start = end
        return found


def make_strips(
    row0: Indices,
    row1: Indices,
    column0: Indices,
    column1: Indices,
    masked: NDArray[np.bool_] | bool = False,
    causal: NDArray[np.bool_] | bool = False,
) -> Strips:
    """Strips without facts about an example; those without rows or columns are left out."""
    flags = [np.broadcast_to(flag, row0.shape) for flag in (masked, causal, False)]
    strips = Strips(row0, row1, column0, column1, flags[0], flags[1], flags[2], np.zeros_like(row0))
    return strips[(row1 > row0) & (column1 > column0)]
