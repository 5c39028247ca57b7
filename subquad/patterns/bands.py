"""Patterns of the distance i - j alone: windows, strides, powers of two."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from subquad.patterns.pattern import And, Pattern
from subquad.patterns.terms import UNBOUNDED, Classes, Indices, Term, check_integer, classify


class Band(Pattern):
    """Visible where low <= i - j <= high and i - j is a multiple of the modulus."""

    @property
    @abstractmethod
    def term(self) -> Term:
        """The bounds and the modulus."""

    @property
    def by_distance(self) -> bool:
        """Always."""
        return True

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """By the distance."""
        low, high, modulus, _ = self.term
        distance = i - j
        inside = torch.ones_like(distance, dtype=torch.bool)
        if low > -UNBOUNDED:
            inside = inside & (distance >= low)
        if high < UNBOUNDED:
            inside = inside & (distance <= high)
        return inside & (distance % modulus == 0) if modulus > 1 else inside

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """By interval arithmetic on the distance."""
        low, high, modulus, _ = self.term
        nearest, furthest = np.maximum(i0 - j1, low), np.minimum(i1 - j0, high)
        some = nearest <= furthest
        if modulus > 1:
            some = some & (-(-nearest // modulus) <= furthest // modulus)
        everything = (i0 - j1 >= low) & (i1 - j0 <= high)
        if modulus > 1:
            everything = everything & (i1 - j0 == i0 - j1) & ((i0 - j1) % modulus == 0)
        return classify(some, everything)

    def offsets(self) -> tuple[int, int]:
        """The bounds."""
        return self.term.low, self.term.high

    def terms(self) -> list[Term]:
        """Itself, unless nothing is visible."""
        return [] if self.term.empty else [self.term]

    def complement(self) -> list[Term]:
        """What lies on both sides, where there are no gaps inside."""
        low, high, modulus, _ = self.term
        if self.term.empty:
            return [Term()]
        if modulus > 1:
            return super().complement()
        sides = (Term(high=low - 1) if low > -UNBOUNDED else None, Term(low=high + 1) if high < UNBOUNDED else None)
        return [side for side in sides if side is not None]


@dataclass(frozen=True)
class Distances(Band):
    """The distances that a term allows, without its filters."""

    bounds: Term

    @property
    def term(self) -> Term:
        """The bounds alone."""
        return self.bounds._replace(filters=())


def pattern_of(term: Term) -> Pattern:
    """The pattern of one conjunction."""
    distances = Distances(term._replace(filters=()))
    if not term.filters:
        return distances
    others = And(term.filters) if len(term.filters) > 1 else next(iter(term.filters))
    return others if distances.term == Term() else And((distances, *term.filters))


@dataclass(frozen=True)
class Causal(Band):
    """j <= i."""

    @property
    def term(self) -> Term:
        """No bound on the past."""
        return Term(low=0)


@dataclass(frozen=True)
class Window(Band):
    """-right <= i - j <= left: `left` keys before the query, itself, and `right` after it."""

    left: int
    right: int

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_sides("Window", self.left, self.right)

    @property
    def term(self) -> Term:
        """Both sides."""
        return Term(-min(self.right, UNBOUNDED), min(self.left, UNBOUNDED))


@dataclass(frozen=True)
class Dilated(Band):
    """A window of every `dilation`-th key: `left` steps back, `right` steps ahead."""

    left: int
    right: int
    dilation: int

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_sides("Dilated", self.left, self.right)
        check_integer("Dilated", "dilation", self.dilation, least=1, remedy="1 is a plain window")

    @property
    def term(self) -> Term:
        """Both sides, in keys."""
        low, high = (min(steps * self.dilation, UNBOUNDED) for steps in (self.right, self.left))
        return Term(-low, high, self.dilation)


@dataclass(frozen=True)
class Strided(Band):
    """(i - j) % stride == 0, in both directions."""

    stride: int

    def __post_init__(self) -> None:
        """Check ranges."""
        check_integer("Strided", "stride", self.stride, least=1, remedy="1 makes every key visible")

    @property
    def term(self) -> Term:
        """No bounds."""
        return Term(modulus=self.stride)


@dataclass(frozen=True)
class Ngram(Band):
    """The n - 1 keys that end with the query itself: 0 <= i - j <= n - 2; none for n = 1."""

    n: int

    def __post_init__(self) -> None:
        """Check ranges."""
        check_integer("Ngram", "n", self.n, least=1, remedy="with n = 2 a token sees itself alone, with n = 1 nothing")

    @property
    def term(self) -> Term:
        """Empty for n = 1."""
        return Term(0, self.n - 2)


@dataclass(frozen=True)
class Log(Pattern):
    """i - j is 0 or a power of two."""

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """A power of two has one bit."""
        distance = i - j
        return (distance >= 0) & (distance & (distance - 1) == 0)

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """Whether the interval of distances holds one of them."""
        nearest, furthest = i0 - j1, i1 - j0
        members = np.array([0, *(1 << power for power in range(62))], dtype=np.int64)
        some = np.searchsorted(members, furthest, side="right") > np.searchsorted(members, nearest, side="left")
        everything = (nearest >= 0) & ((furthest <= 2) | (nearest == furthest))
        return classify(some, everything)

    def offsets(self) -> tuple[int, int]:
        """The past."""
        return 0, UNBOUNDED

    @property
    def by_distance(self) -> bool:
        """Always."""
        return True


def _check_sides(owner: str, left: int, right: int) -> None:
    for name, steps in (("left", left), ("right", right)):
        check_integer(owner, name, steps, least=0, remedy="to leave the query itself out, intersect with ~Window(0, 0)")
