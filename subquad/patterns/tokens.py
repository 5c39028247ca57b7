"""Patterns of chosen tokens: summary columns, globals, sinks, documents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from subquad.patterns.pattern import Classes, Indices, Pattern, Term, Tile


@dataclass(frozen=True)
class Columns(Pattern):
    """Keys that every query sees: the `count` last of each `stride`, or as many before the `offset` last ones.

    stride - count - offset <= j % stride < stride - offset
    """

    stride: int
    count: int
    offset: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.stride < 1 or self.count < 1 or self.offset < 0 or self.count + self.offset > self.stride:
            raise ValueError(
                f"Columns: count >= 1 columns and the offset >= 0 after them must fit into the stride; got "
                f"stride={self.stride}, count={self.count}, offset={self.offset}"
            )

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """By the key's place in its stride."""
        place = j % self.stride
        first = self.stride - self.count - self.offset
        return (place >= first) & (place < first + self.count) & (i == i)

    def _before(self, position: Indices) -> Indices:
        """How many such keys there are below a position."""
        first = self.stride - self.count - self.offset
        return position // self.stride * self.count + np.clip(position % self.stride - first, 0, self.count)

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """By counting."""
        return _classify(self._before(j1 + 1) - self._before(j0), j1 - j0 + 1, i0)

    def chosen_keys(self, length: int) -> Indices:
        """The columns."""
        place = np.arange(length) % self.stride
        first = self.stride - self.count - self.offset
        return np.flatnonzero((place >= first) & (place < first + self.count))


@dataclass(frozen=True)
class Sink(Pattern):
    """The first `count` keys, seen by every query."""

    count: int

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.count < 0:
            raise ValueError(f"Sink: count can't be negative, got {self.count}")

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """The first keys."""
        return (j < self.count) & (i == i)

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """By counting."""
        return _classify(np.clip(self.count - j0, 0, j1 - j0 + 1), j1 - j0 + 1, i0)

    def terms(self) -> list[Term]:
        """Nothing for no keys."""
        return [Term(filters=(self,))] if self.count else []

    def chosen_keys(self, length: int) -> Indices:
        """The first keys."""
        return np.arange(min(self.count, length))


@dataclass(frozen=True)
class Global(Pattern):
    """Chosen tokens that every query sees (`cols`) and that see every key (`rows`).

    `index` may be an int or any sequence or 1-D tensor of ints; it is kept as a sorted tuple.
    """

    index: tuple[int, ...]
    rows: bool = True
    cols: bool = True
    member: Tensor | None = field(default=None, compare=False, repr=False)
    """bool (S,), once resolved."""

    def __init__(
        self,
        index: int | Iterable[int] | Tensor,
        rows: bool = True,
        cols: bool = True,
        *,
        member: Tensor | None = None,
    ) -> None:
        """Check and sort.

        Raises:
            ValueError: indices that are no integers or negative, or neither rows nor columns.
        """
        for name, value in (("index", _sorted_indices(index)), ("rows", rows), ("cols", cols), ("member", member)):
            object.__setattr__(self, name, value)
        if not rows and not cols:
            raise ValueError("Global: with rows=False and cols=False nothing is visible; leave the pattern out instead")

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """By membership of the key or of the query."""
        member = self._members()
        rows = _look_up(member, i) & (j == j) if self.rows else None
        cols = _look_up(member, j) & (i == i) if self.cols else None
        if rows is None or cols is None:
            return cols if rows is None else rows  # pyright: ignore[reportReturnType] - never neither
        return rows | cols

    def _members(self) -> Tensor:
        if self.member is None:
            raise ValueError("Global: resolve(length) must come before visible(i, j)")
        return self.member

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """By counting members."""
        members = np.array(self.index, dtype=np.int64)
        classes = np.zeros(np.broadcast_shapes(i0.shape, i1.shape, j0.shape, j1.shape), dtype=np.int8)
        for wanted, first, last in ((self.rows, i0, i1), (self.cols, j0, j1)):
            if wanted:
                count = np.searchsorted(members, last, side="right") - np.searchsorted(members, first, side="left")
                classes = np.maximum(classes, _classify(count, last - first + 1, first))
        return classes

    def terms(self) -> list[Term]:
        """Columns and rows apart."""
        if not self.index:
            return []
        if not (self.rows and self.cols):
            return [Term(filters=(self,))]
        cols = Global(self.index, rows=False, member=self.member)
        rows = Global(self.index, cols=False, member=self.member)
        return [Term(filters=(cols,)), Term(filters=(rows,))]

    def resolve(self, length: int) -> Pattern:
        """With a table of the members.

        Raises:
            ValueError: an index past the end.
        """
        if self.index and self.index[-1] >= length:
            raise ValueError(
                f"Global: index {self.index[-1]} lies past the end of a sequence of {length} tokens; the last one is "
                f"{length - 1}"
            )
        member = torch.zeros(length, dtype=torch.bool)
        member[list(self.index)] = True
        return Global(self.index, self.rows, self.cols, member=member)

    def chosen_keys(self, length: int) -> Indices | None:
        """The tokens, where only columns are meant."""
        return None if self.rows else np.array(self.index, dtype=np.int64)

    def chosen_queries(self, length: int) -> Indices | None:
        """The tokens, where only rows are meant."""
        return None if self.cols else np.array(self.index, dtype=np.int64)


@dataclass(frozen=True)
class Documents(Pattern):
    """Tokens of the same document see each other; `ids` has one integer for each position."""

    ids: tuple[int, ...]
    table: Tensor | None = field(default=None, compare=False, repr=False)
    """int64 (S,), once resolved."""

    def __init__(self, ids: Iterable[int] | Tensor, *, table: Tensor | None = None) -> None:
        """Keep the ids as a tuple."""
        values = ids.tolist() if isinstance(ids, Tensor) else ids
        object.__setattr__(self, "ids", tuple(int(value) for value in values))
        object.__setattr__(self, "table", table)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """By equality."""
        if self.table is None:
            raise ValueError("Documents: resolve(length) must come before visible(i, j)")
        return _look_up(self.table, i, -1) == _look_up(self.table, j, -2)

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """By first and last id, where the ids never decrease."""
        ids = np.array(self.ids, dtype=np.int64)
        if not len(ids) or (np.diff(ids) < 0).any():
            return super().tiles(i0, i1, j0, j1)
        last = len(ids) - 1
        i0, i1, j0, j1 = (np.clip(position, 0, last) for position in (i0, i1, j0, j1))
        everything = ids[i0] == ids[i1]
        everything = everything & (ids[j0] == ids[i0]) & (ids[j1] == ids[i0])
        some = (ids[i0] <= ids[j1]) & (ids[j0] <= ids[i1])
        return np.where(some, np.where(everything, Tile.FULL, Tile.PARTIAL), Tile.EMPTY).astype(np.int8)

    def resolve(self, length: int) -> Pattern:
        """With a table of the ids.

        Raises:
            ValueError: more or fewer ids than keys.
        """
        if len(self.ids) != length:
            raise ValueError(f"Documents: one id for each of {length} tokens is needed, got {len(self.ids)}")
        return Documents(self.ids, table=torch.tensor(self.ids, dtype=torch.int64))


def _sorted_indices(index: int | Iterable[int] | Tensor) -> tuple[int, ...]:
    values = index.tolist() if isinstance(index, Tensor) else index
    listed = [values] if isinstance(values, int) else list(values)
    if any(isinstance(value, bool) or int(value) != value for value in listed):
        raise ValueError(f"Global: index must hold integer positions, got {index!r}")
    chosen = tuple(sorted({int(value) for value in listed}))
    if chosen and chosen[0] < 0:
        raise ValueError(f"Global: positions are counted from 0, got {chosen[0]}")
    return chosen


def _look_up(table: Tensor, position: Tensor, outside: int = 0) -> Tensor:
    """Entries of a table; `outside` for positions behind its end (queries may reach further than keys)."""
    if not table.numel():
        return torch.full_like(position, outside, dtype=table.dtype)
    found = table.to(position.device)[position.clamp(0, table.numel() - 1)]
    return torch.where(position < table.numel(), found, torch.full_like(found, outside))


def _classify(count: Indices, size: Indices, like: Indices) -> Classes:
    classes = np.where(count > 0, np.where(count == size, Tile.FULL, Tile.PARTIAL), Tile.EMPTY).astype(np.int8)
    return np.broadcast_to(classes, np.broadcast_shapes(classes.shape, like.shape))
