"""Patterns whose queries start at a later position: cached decoding."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from subquad.patterns.composition import Compound
from subquad.patterns.pattern import Pattern
from subquad.patterns.terms import UNBOUNDED, Classes, Indices, Term, check_integer


@dataclass(frozen=True)
class Shifted(Compound):
    """A pattern whose queries start at a position other than 0."""

    part: Pattern
    offset: int

    @property
    def inner(self) -> tuple[Pattern, ...]:
        """The pattern that is shifted."""
        return (self.part,)

    def rebuild(self, inner: tuple[Pattern, ...]) -> Pattern:
        """Another one, shifted as far."""
        return replace(self, part=inner[0])

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """At the true position of the query."""
        return self.part.visible(i + self.offset, j)

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """At the true position of the queries."""
        return self.part.tiles(i0 + self.offset, i1 + self.offset, j0, j1)

    def offsets(self) -> tuple[int, int]:
        """Bounds moved against the queries."""
        low, high = self.part.offsets()
        return _moved(low, self.offset), _moved(high, self.offset)

    def terms(self) -> list[Term]:
        """Terms moved against the queries."""
        return self._move(self.part.terms(), self)

    def complement(self) -> list[Term]:
        """Left out, moved likewise."""
        return self._move(self.part.complement(), ~self)

    def _move(self, terms: list[Term], whole: Pattern) -> list[Term]:
        if any(self.offset % term.modulus for term in terms):
            return [Term(filters=(whole,))]
        return [
            Term(
                _moved(t.low, self.offset),
                _moved(t.high, self.offset),
                t.modulus,
                tuple(f.shift(self.offset) for f in t.filters),
            )
            for t in terms
        ]

    def chosen_keys(self, length: int) -> Indices | None:
        """Those of the part."""
        return self.part.chosen_keys(length)

    def chosen_queries(self, length: int) -> Indices | None:
        """Those of the part that come after the shift."""
        chosen = self.part.chosen_queries(length + self.offset)
        return None if chosen is None else chosen[chosen >= self.offset] - self.offset

    @property
    def block(self) -> int | None:
        """That of the part, where the queries start with a block."""
        return self.part.block if self.part.block is not None and self.offset % self.part.block == 0 else None

    def shift(self, offset: int) -> Pattern:
        """Both shifts in one."""
        check_integer("shift", "offset", offset, least=0, remedy="it is the position of the first query")
        return self.part.shift(self.offset + offset)


def _moved(bound: int, offset: int) -> int:
    return bound if abs(bound) == UNBOUNDED else bound - offset
