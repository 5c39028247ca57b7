"""What varies by example, prepared for strips: which need a mask on its account, which are cut, and which left out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from subquad.ops.fused import TALL_ROWS
from subquad.ops.pattern.request import Facts
from subquad.ops.pattern.strips import Numbering, Shape, Strips
from subquad.patterns.pattern import UNBOUNDED, Indices

STRIP_PRICE = 1.5
"""What pairs cost in strips around documents, in multiples of those in slices."""
TRIMMED_PAIRS = 2**13
"""Pairs that a strip must lose to be worth a call of its own."""


@dataclass(frozen=True)
class ExampleFacts:
    """The facts of one example that restrict anything.

    Attributes:
        query_valid: bool (L,), or None where all are.
        key_valid: bool (S,), or None likewise.
        query_segments: int (L,), or None where all tokens are of one segment.
        key_segments: int (S,), or None likewise.
    """

    query_valid: Tensor | None
    key_valid: Tensor | None
    query_segments: Tensor | None
    key_segments: Tensor | None

    @classmethod
    def of(cls, facts: Facts) -> ExampleFacts:
        """Leave out what restricts nothing; `facts` without a batch dimension."""
        query_valid, key_valid = (
            None if fact is None or bool(fact.all()) else fact for fact in (facts.query_valid, facts.key_valid)
        )
        query_segments, key_segments = facts.query_segments, facts.key_segments
        if query_segments is None or key_segments is None or _all_equal(query_segments, key_segments):
            return cls(query_valid, key_valid, None, None)
        return cls(query_valid, key_valid, query_segments, key_segments)

    @classmethod
    def nothing(cls) -> ExampleFacts:
        """No restriction."""
        return cls(None, None, None, None)

    @property
    def anything(self) -> bool:
        """Whether anything is restricted."""
        return any(fact is not None for fact in (self.query_valid, self.key_valid, self.query_segments))

    def without_keys(self, hidden: Tensor) -> ExampleFacts:
        """The same with some keys hidden; bool (S,)."""
        return replace(self, key_valid=~hidden if self.key_valid is None else self.key_valid & ~hidden)

    def visible(self, query: Tensor, key: Tensor) -> Tensor | None:
        """Which pairs these facts allow, broadcast from indices of queries and of keys; None for all."""
        parts = []
        if self.key_valid is not None:
            parts.append(self.key_valid[key])
        if self.query_segments is not None and self.key_segments is not None:
            parts.append(self.query_segments[query] == self.key_segments[key])
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else parts[0] & parts[1]

    def restrict(self, strips: Strips, numbering: Numbering) -> Strips:
        """Leave out the strips in which nothing is visible, and mask those in which something isn't."""
        spread = numbering.lanes - 1
        queries = numbering.query(strips.row0), numbering.query(strips.row1 - 1) + spread
        keys = numbering.key(strips.column0), numbering.key(strips.column1 - 1) + spread
        kept, whole = self.classify(*queries, *keys)
        masked = strips.masked | (strips.causal & ~whole)
        restricted = replace(strips, masked=masked, causal=strips.causal & whole, restricted=~whole)[kept]
        return self._trimmed(restricted, numbering)

    def _trimmed(self, strips: Strips, numbering: Numbering) -> Strips:
        """Cut off the columns at both ends of restricted strips of which no row sees anything, where these are many."""
        spread = numbering.lanes - 1
        low, high = self._reach(numbering.query(strips.row0), numbering.query(strips.row1 - 1) + spread)
        column0 = np.maximum(strips.column0, numbering.column(low - spread))
        column1 = np.minimum(strips.column1, numbering.column(high + 1))
        saved = (strips.row1 - strips.row0) * (strips.column1 - strips.column0 - (column1 - column0))
        trimmed = strips.restricted & (saved >= TRIMMED_PAIRS)
        return replace(
            strips,
            column0=np.where(trimmed, column0, strips.column0),
            column1=np.where(trimmed, column1, strips.column1),
        )

    def _reach(self, query0: Indices, query1: Indices) -> tuple[Indices, Indices]:
        """The first and the last key that ranges of queries may see, ends included; all for segments out of order."""
        low, high = np.zeros_like(query0), np.full_like(query1, UNBOUNDED)
        if self.key_valid is not None:
            valid = np.flatnonzero(self.key_valid.numpy())
            low, high = np.maximum(low, valid[:1].sum()), np.minimum(high, valid[-1:].sum())
        if self.query_segments is not None and self.key_segments is not None:
            query_segments, key_segments = self.query_segments.numpy(), self.key_segments.numpy()
            if _in_order(key_segments):
                low = np.maximum(low, np.searchsorted(key_segments, query_segments[query0], "left"))
                high = np.minimum(high, np.searchsorted(key_segments, query_segments[query1], "right") - 1)
        return low, high

    def classify(self, query0: Indices, query1: Indices, key0: Indices, key1: Indices) -> tuple[np.ndarray, np.ndarray]:
        """Whether anything may be, and whether everything is allowed between ranges, ends included; as `tiles`."""
        kept = np.ones(np.broadcast_shapes(query0.shape, key0.shape), dtype=bool)
        whole = kept.copy()
        if self.query_valid is not None:
            kept &= _count(self.query_valid, query0, query1) > 0
        if self.key_valid is not None:
            valid = _count(self.key_valid, key0, key1)
            kept &= valid > 0
            whole &= valid == key1 - key0 + 1
        if self.query_segments is not None and self.key_segments is not None:
            query_segments, key_segments = self.query_segments.numpy(), self.key_segments.numpy()
            low, high = (query_segments[position] for position in (query0, query1))
            first, last = (key_segments[position] for position in (key0, key1))
            if _in_order(key_segments):
                kept &= (low <= last) & (first <= high)
                whole &= (low == high) & (first == last) & (low == first)
            else:
                whole &= False
        return kept, whole


def _count(valid: Tensor, first: Indices, last: Indices) -> Indices:
    before = np.concatenate(([0], np.cumsum(valid.numpy())))
    return before[last + 1] - before[first]


def _in_order(segments: np.ndarray) -> bool:
    return bool((segments[1:] >= segments[:-1]).all())


def _all_equal(query_segments: Tensor, key_segments: Tensor) -> bool:
    return bool((query_segments == query_segments[:1]).all() and (key_segments == query_segments[:1]).all())


def documents_save(facts: Facts, shape: Shape) -> bool:
    """Whether documents hide so much that strips cut to them cost less than slices of all pairs."""
    if facts.query_segments is None or facts.key_segments is None:
        return False
    shares = [_share_inside(*ids) for ids in zip(facts.query_segments, facts.key_segments, strict=True)]
    pairs, calls = shape.queries * shape.keys, 1 + shape.queries // TALL_ROWS
    return bool(STRIP_PRICE * np.mean(shares) * pairs + calls * shape.call_pairs < pairs)


def _share_inside(query_segments: Tensor, key_segments: Tensor) -> float:
    """Of all pairs, those inside one document; all, where keys don't stand in order."""
    queries, keys = query_segments.numpy(), key_segments.numpy()
    if not _in_order(keys):
        return 1.0
    counts = np.searchsorted(keys, queries, "right") - np.searchsorted(keys, queries, "left")
    return float(counts.mean()) / len(keys)
