"""Patterns of chosen tokens: summary columns, globals, sinks, documents."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from subquad.patterns.pattern import Pattern
from subquad.patterns.terms import Classes, Indices, Term, check_integer, classify, is_integer


class KeySet(Pattern):
    """Keys that every query sees."""

    @abstractmethod
    def before(self, position: Indices) -> Indices:
        """How many such keys there are below a position."""

    @abstractmethod
    def chosen_keys(self, length: int) -> Indices:
        """The keys below `length`."""

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """By counting."""
        count = self.before(j1 + 1) - self.before(j0)
        classes = classify(count > 0, count == j1 - j0 + 1)
        return np.broadcast_to(classes, np.broadcast_shapes(classes.shape, i0.shape, i1.shape))

    def shift(self, offset: int) -> Pattern:
        """Itself: the query doesn't matter."""
        super().shift(offset)
        return self


@dataclass(frozen=True)
class Columns(KeySet):
    """Keys that every query sees: the `count` last of each `stride`, or as many before the `offset` last ones.

    stride - count - offset <= j % stride < stride - offset
    """

    stride: int
    count: int
    offset: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        check_integer("Columns", "stride", self.stride, least=1, remedy="it is the distance of two summary columns")
        check_integer("Columns", "count", self.count, least=1, remedy="leave the pattern out for no columns")
        check_integer("Columns", "offset", self.offset, least=0, remedy="it counts the tokens after the columns")
        if self.count + self.offset > self.stride:
            raise ValueError(
                f"Columns: count + offset = {self.count} + {self.offset} must fit into the stride, got {self.stride}; "
                "lower them or take a larger stride"
            )

    @property
    def first(self) -> int:
        """The first such place of a stride."""
        return self.stride - self.count - self.offset

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """By the key's place in its stride."""
        place = j % self.stride
        return (place >= self.first) & (place < self.first + self.count) & (i == i)

    def terms(self) -> list[Term]:
        """Every key, where the columns fill their stride."""
        return [Term()] if self.count == self.stride else super().terms()

    def complement(self) -> list[Term]:
        """No key then."""
        return [] if self.count == self.stride else super().complement()

    def before(self, position: Indices) -> Indices:
        """Those of whole strides, then those of the last one."""
        return position // self.stride * self.count + np.clip(position % self.stride - self.first, 0, self.count)

    def chosen_keys(self, length: int) -> Indices:
        """The columns."""
        place = np.arange(length) % self.stride
        return np.flatnonzero((place >= self.first) & (place < self.first + self.count))


@dataclass(frozen=True)
class Sink(KeySet):
    """The first `count` keys, seen by every query."""

    count: int

    def __post_init__(self) -> None:
        """Check ranges."""
        check_integer("Sink", "count", self.count, least=0, remedy="it is how many of the first keys all queries see")

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """The first keys."""
        return (j < self.count) & (i == i)

    def before(self, position: Indices) -> Indices:
        """All of them, at most."""
        return np.minimum(position, self.count)

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
        if self.member is None:
            raise ValueError("Global: resolve(length) must come before visible(i, j)")
        length = self.member.shape[0]
        rows = _look_up(self.member, i) & (i < length) & (j == j) if self.rows else None
        cols = _look_up(self.member, j) & (j < length) & (i == i) if self.cols else None
        if rows is None or cols is None:
            return cols if rows is None else rows  # pyright: ignore[reportReturnType] - never neither
        return rows | cols

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """By counting members."""
        members = np.array(self.index, dtype=np.int64)
        some, everything = np.zeros((2, *np.broadcast_shapes(i0.shape, i1.shape, j0.shape, j1.shape)), dtype=bool)
        for wanted, first, last in ((self.rows, i0, i1), (self.cols, j0, j1)):
            if wanted:
                count = np.searchsorted(members, last, side="right") - np.searchsorted(members, first, side="left")
                some, everything = some | (count > 0), everything | (count == last - first + 1)
        return classify(some, everything)

    def terms(self) -> list[Term]:
        """Columns and rows apart."""
        if not self.index:
            return []
        if not (self.rows and self.cols):
            return [Term(filters=(self,))]
        return [Term(filters=(replace(self, rows=False),)), Term(filters=(replace(self, cols=False),))]

    def complement(self) -> list[Term]:
        """Neither in a column nor in a row."""
        return [Term(filters=tuple(~part for term in self.terms() for part in term.filters))]

    def resolve(self, length: int) -> Pattern:
        """With a table of the members.

        Raises:
            ValueError: an index past the end.
        """
        if self.index and self.index[-1] >= length:
            raise ValueError(
                f"Global: index {self.index[-1]} lies past the end of a sequence of {length} tokens; leave it out, or "
                "keep to shorter prefixes of the index for short sequences"
            )
        member = torch.zeros(length, dtype=torch.bool)
        member[list(self.index)] = True
        return replace(self, member=member)

    def to(self, device: torch.device) -> Pattern:
        """With the table there."""
        return self if self.member is None else replace(self, member=self.member.to(device))

    def chosen_keys(self, length: int) -> Indices | None:
        """The tokens, where only columns are meant."""
        return None if self.rows else self._below(length)

    def chosen_queries(self, length: int) -> Indices | None:
        """The tokens, where only rows are meant."""
        return None if self.cols else self._below(length)

    def _below(self, length: int) -> Indices:
        members = np.array(self.index, dtype=np.int64)
        return members[members < length]


@dataclass(frozen=True)
class Documents(Pattern):
    """Tokens of the same document see each other; `ids` has one integer for each position."""

    ids: tuple[int, ...]
    table: Tensor | None = field(default=None, compare=False, repr=False)
    """int64 (S,), once resolved."""
    ordered: bool = field(default=False, compare=False, repr=False)
    """Whether the ids never decrease; known once resolved."""

    def __init__(self, ids: Iterable[int] | Tensor, *, table: Tensor | None = None, ordered: bool = False) -> None:
        """Keep the ids as a tuple.

        Raises:
            ValueError: ids that are no integers.
        """
        values = _integers("Documents", "ids", ids)
        for name, value in (("ids", tuple(values)), ("table", table), ("ordered", ordered)):
            object.__setattr__(self, name, value)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """By equality."""
        if self.table is None:
            raise ValueError("Documents: resolve(length) must come before visible(i, j)")
        length = self.table.shape[0]
        return (_look_up(self.table, i) == _look_up(self.table, j)) & (i < length) & (j < length)

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """By first and last id, where the ids never decrease."""
        if self.table is None or not self.ordered:
            return super().tiles(i0, i1, j0, j1)
        ids, last = self.table.cpu().numpy(), len(self.ids) - 1
        row0, row1, column0, column1 = (ids[np.minimum(position, last)] for position in (i0, i1, j0, j1))
        inside = (i1 <= last) & (j1 <= last)
        everything = (row0 == row1) & (column0 == column1) & (row0 == column0) & inside
        return classify((row0 <= column1) & (column0 <= row1) & (i0 <= last) & (j0 <= last), everything)

    def resolve(self, length: int) -> Pattern:
        """With a table of the ids.

        Raises:
            ValueError: more or fewer ids than keys.
        """
        if len(self.ids) != length:
            raise ValueError(
                f"Documents: ids must name the document of each of {length} tokens, got {len(self.ids)} ids; packed "
                "batches, whose documents differ by example, are described by Mask(segments=...)"
            )
        table = torch.tensor(self.ids, dtype=torch.int64)
        ordered = length > 0 and bool((table.diff() >= 0).all())
        return Documents(self.ids, table=table, ordered=ordered)

    def to(self, device: torch.device) -> Pattern:
        """With the table there."""
        return self if self.table is None else replace(self, table=self.table.to(device))


def _integers(owner: str, name: str, given: int | Iterable[int] | Tensor) -> list[int]:
    """The integers of a sequence or tensor; one alone is a sequence of one."""
    values = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
    listed = list(values) if isinstance(values, Iterable) else [values]
    if not all(is_integer(value) for value in listed):
        raise ValueError(
            f"{owner}: {name} must hold integers along one dimension, got {given!r}; a mask becomes positions by "
            "mask.nonzero().flatten()"
        )
    return [operator.index(value) for value in listed]


def _sorted_indices(index: int | Iterable[int] | Tensor) -> tuple[int, ...]:
    chosen = tuple(sorted(set(_integers("Global", "index", index))))
    if chosen and chosen[0] < 0:
        raise ValueError(f"Global: index must hold positions counted from 0, got {chosen[0]}; count from the start")
    return chosen


def _look_up(table: Tensor, position: Tensor) -> Tensor:
    """Entries of a table; the last one for positions behind its end (queries may reach further than keys)."""
    length = table.shape[0]
    return table[position.clamp(0, length - 1)] if length else torch.zeros_like(position, dtype=table.dtype)
