"""Patterns made of patterns: unions, intersections, complements, patterns by head."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from subquad.patterns.pattern import Pattern
from subquad.patterns.terms import Classes, Indices, Term, Tile

MOST_TERMS = 64
"""Conjunctions that a product may have before it is kept as it is."""


class Compound(Pattern):
    """A pattern made of others, all of which answer where a question doesn't concern how they are composed."""

    @property
    @abstractmethod
    def inner(self) -> tuple[Pattern, ...]:
        """The patterns it is made of."""

    @abstractmethod
    def rebuild(self, inner: tuple[Pattern, ...]) -> Pattern:
        """The same composition of other patterns."""

    def resolve(self, length: int) -> Pattern:
        """All of them resolved."""
        return self.rebuild(tuple(part.resolve(length) for part in self.inner))

    def to(self, device: torch.device) -> Pattern:
        """All of them moved."""
        return self.rebuild(tuple(part.to(device) for part in self.inner))

    @property
    def block(self) -> int | None:
        """The largest block that fits all of them."""
        blocks = [part.block for part in self.inner if part.block is not None]
        return math.gcd(*blocks) if blocks else None

    @property
    def by_distance(self) -> bool:
        """Whether it is so for all of them."""
        return all(part.by_distance for part in self.inner)

    @property
    def num_heads(self) -> int:
        """The most of any of them."""
        return max(part.num_heads for part in self.inner)

    def of_head(self, head: int) -> Pattern:
        """All of them for one head."""
        return self.rebuild(tuple(part.of_head(head) for part in self.inner))


@dataclass(frozen=True)
class Junction(Compound):
    """Several patterns, whose order doesn't matter."""

    parts: tuple[Pattern, ...]

    @property
    def inner(self) -> tuple[Pattern, ...]:
        """The parts."""
        return self.parts

    def rebuild(self, inner: tuple[Pattern, ...]) -> Pattern:
        """Of other parts."""
        return type(self)(inner)


@dataclass(frozen=True)
class And(Junction):
    """Visible in all parts."""

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """In all parts."""
        result = self.parts[0].visible(i, j)
        for part in self.parts[1:]:
            result = result & part.visible(i, j)
        return result

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """The lowest class of any part."""
        return np.minimum.reduce(_tiles_of(self.parts, i0, i1, j0, j1))

    def offsets(self) -> tuple[int, int]:
        """The bounds of all parts."""
        bounds = [part.offsets() for part in self.parts]
        return max(low for low, _ in bounds), min(high for _, high in bounds)

    def terms(self) -> list[Term]:
        """One conjunction for every choice of a term from each part."""
        return _products(self, [part.terms() for part in self.parts])

    def complement(self) -> list[Term]:
        """Left out by any part."""
        return [term for part in self.parts for term in part.complement()]


@dataclass(frozen=True)
class Or(Junction):
    """Visible in any part."""

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """In any part."""
        result = self.parts[0].visible(i, j)
        for part in self.parts[1:]:
            result = result | part.visible(i, j)
        return result

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """The highest class of any part."""
        return np.maximum.reduce(_tiles_of(self.parts, i0, i1, j0, j1))

    def offsets(self) -> tuple[int, int]:
        """The hull of all parts."""
        return _hull(self.parts)

    def terms(self) -> list[Term]:
        """The terms of all parts."""
        return [term for part in self.parts for term in part.terms()]

    def complement(self) -> list[Term]:
        """Left out by all parts."""
        return _products(~self, [part.complement() for part in self.parts])


@dataclass(frozen=True)
class Not(Compound):
    """Visible where the other pattern is not."""

    part: Pattern

    @property
    def inner(self) -> tuple[Pattern, ...]:
        """The other pattern."""
        return (self.part,)

    def rebuild(self, inner: tuple[Pattern, ...]) -> Pattern:
        """Of another part."""
        return Not(inner[0])

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """Not in the part."""
        return ~self.part.visible(i, j)

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """EMPTY and FULL change places."""
        return np.int8(Tile.FULL) - self.part.tiles(i0, i1, j0, j1)

    def offsets(self) -> tuple[int, int]:
        """The hull of the terms, where these are bounded."""
        terms = [term for term in self.part.complement() if not term.empty]
        return min((t.low for t in terms), default=0), max((t.high for t in terms), default=0)

    def terms(self) -> list[Term]:
        """What the part leaves out."""
        return self.part.complement()

    def complement(self) -> list[Term]:
        """The part."""
        return self.part.terms()

    def __invert__(self) -> Pattern:
        """The part."""
        return self.part


@dataclass(frozen=True)
class ByHead(Compound):
    """A pattern of which some heads have their own."""

    base: Pattern
    own: tuple[tuple[int, Pattern], ...]

    @property
    def inner(self) -> tuple[Pattern, ...]:
        """The common pattern, then those of single heads."""
        return (self.base, *(own for _, own in self.own))

    def rebuild(self, inner: tuple[Pattern, ...]) -> Pattern:
        """For the same heads."""
        return ByHead(inner[0], tuple(zip((head for head, _ in self.own), inner[1:], strict=True)))

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """Refused: the answer depends on the head."""
        raise ValueError("visible: this pattern differs by head; ask pattern.of_head(h).visible(i, j)")

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """What is certain for all heads."""
        classes = _tiles_of(self.inner, i0, i1, j0, j1)
        lowest, highest = np.minimum.reduce(classes), np.maximum.reduce(classes)
        return np.where(lowest == highest, lowest, np.int8(Tile.PARTIAL)).astype(np.int8)

    def offsets(self) -> tuple[int, int]:
        """The hull of all heads."""
        return _hull(self.inner)

    @property
    def num_heads(self) -> int:
        """One more than the highest head with a pattern of its own."""
        return max(1 + self.own[-1][0], super().num_heads)

    def of_head(self, head: int) -> Pattern:
        """The head's own pattern, or the common one."""
        return dict(self.own).get(head, self.base).of_head(head)


def joined(kind: type[And] | type[Or], first: Pattern, second: Pattern) -> Pattern:
    """A junction that isn't nested in one of its own kind and names each part once."""
    sides = (side.parts if isinstance(side, kind) else (side,) for side in (first, second))
    parts = tuple(dict.fromkeys(part for side in sides for part in side))
    return kind(parts) if len(parts) > 1 else first


def _tiles_of(parts: tuple[Pattern, ...], i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> tuple[Classes, ...]:
    return np.broadcast_arrays(*(part.tiles(i0, i1, j0, j1) for part in parts))


def _hull(parts: tuple[Pattern, ...]) -> tuple[int, int]:
    bounds = [part.offsets() for part in parts]
    return min(low for low, _ in bounds), max(high for _, high in bounds)


def _products(whole: Pattern, alternatives: list[list[Term]]) -> list[Term]:
    """All conjunctions of one alternative each; the whole as it is, where they would be too many."""
    if math.prod(len(terms) for terms in alternatives) > MOST_TERMS:
        return [Term(filters=(whole,))]
    products = [Term()]
    for terms in alternatives:
        products = [product.meet(term) for product in products for term in terms]
    return [product for product in products if not product.empty]
