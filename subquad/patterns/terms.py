"""The vocabulary of the pattern algebra: tiles say what is known of rectangles of pairs, terms are conjunctions.

Positions are integers counted from 0; i is a query, j a key. Bounds speak of the distance i - j: positive for the past.
"""

from __future__ import annotations

import math
from enum import IntEnum
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from subquad.patterns.pattern import Pattern

Indices = NDArray[np.int64]
Classes = NDArray[np.int8]

UNBOUNDED = 2**62
"""Stands for infinity in bounds of i - j."""


class Tile(IntEnum):
    """What is known of a rectangle of pairs: nothing visible, perhaps some, everything."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2


class Term(NamedTuple):
    """A conjunction: low <= i - j <= high, (i - j) % modulus == 0, and every filter holds."""

    low: int = -UNBOUNDED
    high: int = UNBOUNDED
    modulus: int = 1
    filters: tuple[Pattern, ...] = ()

    @property
    def empty(self) -> bool:
        """No distance between the bounds is a multiple of the modulus, or two filters contradict each other."""
        if self.low > self.high or -(-self.low // self.modulus) > self.high // self.modulus:
            return True
        return any(~f in self.filters for f in self.filters)

    def meet(self, other: Term) -> Term:
        """Both conjunctions together."""
        filters = self.filters + tuple(f for f in other.filters if f not in self.filters)
        low, high = max(self.low, other.low), min(self.high, other.high)
        return Term(low, high, math.lcm(self.modulus, other.modulus), filters)


def classify(some: NDArray[np.bool_], everything: NDArray[np.bool_]) -> Classes:
    """`Tile` classes where some pairs may be visible, and where all are; the second counts only with the first."""
    return np.where(some, np.where(everything, Tile.FULL, Tile.PARTIAL), Tile.EMPTY).astype(np.int8)


def check_integer(owner: str, name: str, value: object, *, least: int, remedy: str) -> None:
    """Refuse what is no integer, too small, or larger than any length.

    Raises:
        ValueError: ending with the remedy.
    """
    if not is_integer(value) or value < least:
        raise ValueError(f"{owner}: {name} must be an integer of at least {least}, got {value!r}; {remedy}")
    if int(value) > UNBOUNDED:
        raise ValueError(f"{owner}: {name} must be at most 2**62, got {value!r}; {remedy}")


def is_integer(value: object) -> TypeGuard[Integral]:
    """Whether a value counts something; True and False don't, and a tensor is no value."""
    return isinstance(value, Integral) and not isinstance(value, bool)
