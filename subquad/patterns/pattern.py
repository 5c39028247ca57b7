"""Patterns: who attends whom, as a predicate that is composed and never as an L x L matrix.

A pattern says for positions i (query) and j (key) whether i may use j. Patterns are frozen, hashable values, the same
for every example of a batch; `|`, `&` and `~` compose them inside one softmax, `.heads` gives heads patterns of their
own, and `.shift` moves the queries for cached decoding. What varies by example (padding, packed documents) is a `Mask`.

    Causal() & (Window(left=127, right=0) | Strided(128))

Three questions can be asked of a pattern without its matrix: whether single pairs are visible (`visible`), whether all,
some or none of a rectangle of pairs are (`tiles`, sound but not exact), and of which parts it is the union (`terms`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]
Classes = NDArray[np.int8]

UNBOUNDED = 2**62
"""Stands for infinity in bounds of i - j."""
LARGEST_DENSE = 2**26
"""Pairs that `Pattern.dense` agrees to write out."""
MOST_TERMS = 64


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
        return any(Not(f) in self.filters for f in self.filters)

    def meet(self, other: Term) -> Term:
        """Both conjunctions together."""
        filters = self.filters + tuple(f for f in other.filters if f not in self.filters)
        low, high = max(self.low, other.low), min(self.high, other.high)
        return Term(low, high, math.lcm(self.modulus, other.modulus), filters)


class Pattern(ABC):
    """Base of all patterns. Subclasses are frozen dataclasses."""

    @abstractmethod
    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether query i may use key j.

        Args:
            i: integer positions of queries.
            j: integer positions of keys, broadcastable with i.

        Returns:
            bool, of the broadcast shape. Only `resolved` patterns without `.heads` can answer.
        """

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """`Tile` class of the rectangles i0..i1 x j0..j1, ends included; arguments broadcast.

        Sound: EMPTY and FULL are certain, PARTIAL may be either.
        """
        return np.full(np.broadcast_shapes(i0.shape, i1.shape, j0.shape, j1.shape), Tile.PARTIAL, dtype=np.int8)

    def offsets(self) -> tuple[int, int]:
        """Bounds low <= i - j <= high that every visible pair keeps; sound but not always tight."""
        return -UNBOUNDED, UNBOUNDED

    def terms(self) -> list[Term]:
        """The pattern as a union of conjunctions, which may overlap."""
        return [Term(filters=(self,))]

    def complement(self) -> list[Term]:
        """What the pattern leaves out, as a union of conjunctions."""
        return [Term(filters=(Not(self),))]

    def resolve(self, length: int) -> Pattern:
        """The pattern for sequences of `length` keys, with everything drawn or looked up that depends on it.

        Raises:
            ValueError: the pattern speaks of positions that such a sequence doesn't have.
        """
        return self

    def chosen_keys(self, length: int) -> Indices | None:
        """The keys below `length` that any query sees, where the pattern is a set of keys; else None."""
        return None

    def chosen_queries(self, length: int) -> Indices | None:
        """The queries below `length` that see anything, where the pattern is a set of queries; else None."""
        return None

    @property
    def block(self) -> int | None:
        """The size of the blocks that the pattern is made of, if it is made of blocks."""
        return None

    @property
    def num_heads(self) -> int:
        """One more than the highest head that `.heads` speaks of; 0 where all heads are alike."""
        return 0

    def of_head(self, head: int) -> Pattern:
        """The pattern of one head."""
        return self

    @property
    def causal(self) -> bool:
        """Whether no query can see a later key, as far as `offsets` tells."""
        return self.offsets()[0] >= 0

    def heads(self, patterns: Mapping[int, Pattern]) -> Pattern:
        """Give some heads patterns of their own; the others keep this one.

        Raises:
            ValueError: a negative head.
        """
        if any(head < 0 for head in patterns):
            raise ValueError(f"heads: heads are counted from 0, got {sorted(patterns)}")
        return ByHead(self, tuple(sorted(patterns.items())))

    def shift(self, offset: int) -> Pattern:
        """The same pattern for queries whose position 0 is `offset`: cached decoding."""
        return Shifted(self, offset) if offset else self

    def dense(self, length: int) -> Tensor:
        """The definition: bool (L, L), or (H, L, L) after `.heads`.

        Raises:
            ValueError: more than `LARGEST_DENSE` pairs.
        """
        if max(1, self.num_heads) * length**2 > LARGEST_DENSE:
            raise ValueError(
                f"dense: {max(1, self.num_heads)} x {length} x {length} pairs are too many to write out (at most "
                f"{LARGEST_DENSE}); use density, keys_per_query or pattern_attention, which never do"
            )
        return self.rectangle(length, length)

    def rectangle(self, query_length: int, key_length: int) -> Tensor:
        """Bool (L, S), or (H, L, S) after `.heads`: queries 0..L-1 against keys 0..S-1."""
        resolved = self.resolve(key_length)
        i, j = torch.arange(query_length)[:, None], torch.arange(key_length)
        if not self.num_heads:
            return resolved.visible(i, j).expand(query_length, key_length).clone()
        heads = [resolved.of_head(head).visible(i, j) for head in range(self.num_heads)]
        return torch.stack([head.expand(query_length, key_length) for head in heads])

    def __and__(self, other: Pattern) -> Pattern:
        """Visible in both."""
        return And((*_parts(self, And), *_parts(other, And)))

    def __or__(self, other: Pattern) -> Pattern:
        """Visible in either, counted once."""
        return Or((*_parts(self, Or), *_parts(other, Or)))

    def __invert__(self) -> Pattern:
        """Visible where this pattern is not."""
        return Not(self)


@dataclass(frozen=True)
class And(Pattern):
    """Visible in all parts."""

    parts: tuple[Pattern, ...]

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """In all parts."""
        result = self.parts[0].visible(i, j)
        for part in self.parts[1:]:
            result = result & part.visible(i, j)
        return result

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """The lowest class of any part."""
        return np.minimum.reduce(np.broadcast_arrays(*(part.tiles(i0, i1, j0, j1) for part in self.parts)))

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

    def resolve(self, length: int) -> Pattern:
        """All parts resolved."""
        return And(tuple(part.resolve(length) for part in self.parts))

    @property
    def block(self) -> int | None:
        """The largest block that fits all parts."""
        return _common_block(self.parts)

    @property
    def num_heads(self) -> int:
        """The most of any part."""
        return max(part.num_heads for part in self.parts)

    def of_head(self, head: int) -> Pattern:
        """All parts of one head."""
        return And(tuple(part.of_head(head) for part in self.parts))


@dataclass(frozen=True)
class Or(Pattern):
    """Visible in any part."""

    parts: tuple[Pattern, ...]

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """In any part."""
        result = self.parts[0].visible(i, j)
        for part in self.parts[1:]:
            result = result | part.visible(i, j)
        return result

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """The highest class of any part."""
        return np.maximum.reduce(np.broadcast_arrays(*(part.tiles(i0, i1, j0, j1) for part in self.parts)))

    def offsets(self) -> tuple[int, int]:
        """The hull of all parts."""
        bounds = [part.offsets() for part in self.parts]
        return min(low for low, _ in bounds), max(high for _, high in bounds)

    def terms(self) -> list[Term]:
        """The terms of all parts."""
        return [term for part in self.parts for term in part.terms()]

    def complement(self) -> list[Term]:
        """Left out by all parts."""
        return _products(Not(self), [part.complement() for part in self.parts])

    def resolve(self, length: int) -> Pattern:
        """All parts resolved."""
        return Or(tuple(part.resolve(length) for part in self.parts))

    @property
    def block(self) -> int | None:
        """The largest block that fits all parts."""
        return _common_block(self.parts)

    @property
    def num_heads(self) -> int:
        """The most of any part."""
        return max(part.num_heads for part in self.parts)

    def of_head(self, head: int) -> Pattern:
        """All parts of one head."""
        return Or(tuple(part.of_head(head) for part in self.parts))


@dataclass(frozen=True)
class Not(Pattern):
    """Visible where the other pattern is not."""

    part: Pattern

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """Not in the part."""
        return ~self.part.visible(i, j)

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """EMPTY and FULL change places."""
        return np.int8(Tile.FULL) - self.part.tiles(i0, i1, j0, j1)

    def terms(self) -> list[Term]:
        """What the part leaves out."""
        return self.part.complement()

    def complement(self) -> list[Term]:
        """The part."""
        return self.part.terms()

    def offsets(self) -> tuple[int, int]:
        """The hull of the terms, where these are bounded."""
        terms = [term for term in self.part.complement() if not term.empty]
        return min((t.low for t in terms), default=0), max((t.high for t in terms), default=0)

    def resolve(self, length: int) -> Pattern:
        """The part resolved."""
        return Not(self.part.resolve(length))

    @property
    def block(self) -> int | None:
        """That of the part."""
        return self.part.block

    @property
    def num_heads(self) -> int:
        """That of the part."""
        return self.part.num_heads

    def of_head(self, head: int) -> Pattern:
        """The part of one head."""
        return Not(self.part.of_head(head))


@dataclass(frozen=True)
class ByHead(Pattern):
    """A pattern of which some heads have their own."""

    base: Pattern
    own: tuple[tuple[int, Pattern], ...]

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """Refused: the answer depends on the head."""
        raise ValueError("visible: this pattern differs by head; ask pattern.of_head(h).visible(i, j)")

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """What is certain for all heads."""
        classes = [pattern.tiles(i0, i1, j0, j1) for pattern in (self.base, *(own for _, own in self.own))]
        lowest, highest = np.minimum.reduce(classes), np.maximum.reduce(classes)
        return np.where(lowest == highest, lowest, np.int8(Tile.PARTIAL)).astype(np.int8)

    def offsets(self) -> tuple[int, int]:
        """The hull of all heads."""
        return Or((self.base, *(own for _, own in self.own))).offsets()

    def resolve(self, length: int) -> Pattern:
        """All heads resolved."""
        return ByHead(self.base.resolve(length), tuple((head, own.resolve(length)) for head, own in self.own))

    @property
    def block(self) -> int | None:
        """The largest block that fits all heads."""
        return _common_block((self.base, *(own for _, own in self.own)))

    @property
    def num_heads(self) -> int:
        """One more than the highest head with a pattern of its own."""
        inner = (self.base, *(own for _, own in self.own))
        return max(1 + max((head for head, _ in self.own), default=-1), *(pattern.num_heads for pattern in inner))

    def of_head(self, head: int) -> Pattern:
        """The head's own pattern, or the common one."""
        return dict(self.own).get(head, self.base).of_head(head)


@dataclass(frozen=True)
class Shifted(Pattern):
    """A pattern whose queries start at a position other than 0."""

    part: Pattern
    offset: int

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
        """Terms moved against the queries, where they have no modulus."""
        return self._move(self.part.terms(), self)

    def complement(self) -> list[Term]:
        """Left out, moved likewise."""
        return self._move(self.part.complement(), Not(self))

    def _move(self, terms: list[Term], whole: Pattern) -> list[Term]:
        if any(term.modulus > 1 for term in terms):
            return [Term(filters=(whole,))]
        return [
            Term(
                _moved(t.low, self.offset),
                _moved(t.high, self.offset),
                1,
                tuple(f.shift(self.offset) for f in t.filters),
            )
            for t in terms
        ]

    def resolve(self, length: int) -> Pattern:
        """The part resolved."""
        return Shifted(self.part.resolve(length), self.offset)

    @property
    def num_heads(self) -> int:
        """That of the part."""
        return self.part.num_heads

    def of_head(self, head: int) -> Pattern:
        """The part of one head."""
        return Shifted(self.part.of_head(head), self.offset)

    def shift(self, offset: int) -> Pattern:
        """Both shifts in one."""
        return self.part.shift(self.offset + offset)


def _parts(pattern: Pattern, kind: type[And] | type[Or]) -> tuple[Pattern, ...]:
    return pattern.parts if isinstance(pattern, kind) else (pattern,)


def _moved(bound: int, offset: int) -> int:
    return bound if abs(bound) == UNBOUNDED else bound - offset


def _common_block(parts: tuple[Pattern, ...]) -> int | None:
    blocks = [part.block for part in parts if part.block is not None]
    return math.gcd(*blocks) if blocks else None


def _products(whole: Pattern, alternatives: list[list[Term]]) -> list[Term]:
    """All conjunctions of one alternative each; the whole as it is, where they would be too many."""
    if math.prod(len(terms) for terms in alternatives) > MOST_TERMS:
        return [Term(filters=(whole,))]
    products = [Term()]
    for terms in alternatives:
        products = [product.meet(term) for product in products for term in terms]
    return [product for product in products if not product.empty]
