"""Patterns: who attends whom, as a predicate that is composed and never as an L x L matrix.

A pattern says for positions i (query) and j (key) whether i may use j. Patterns are frozen, hashable values, the same
for every example of a batch; `|`, `&` and `~` compose them inside one softmax, `.heads` gives heads patterns of their
own, and `.shift` moves the queries for cached decoding. What varies by example (padding, packed documents) is a `Mask`.

    Causal() & (Window(left=127, right=0) | Strided(128))

Three questions can be asked of a pattern without its matrix: whether single pairs are visible (`visible`), whether all,
some or none of a rectangle of pairs are (`tiles`, sound but not exact), and of which parts it is the union (`terms`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from subquad.patterns.terms import UNBOUNDED as UNBOUNDED
from subquad.patterns.terms import Classes as Classes
from subquad.patterns.terms import Indices as Indices
from subquad.patterns.terms import Term as Term
from subquad.patterns.terms import Tile as Tile
from subquad.patterns.terms import check_integer

LARGEST_DENSE = 2**26
"""Pairs that `Pattern.dense` agrees to write out."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(example, head, query, key) -> bool, as FlexAttention calls it."""


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
        """`Tile` class of the rectangles i0..i1 x j0..j1, ends included; arguments broadcast. For resolved patterns.

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
        return [Term(filters=(~self,))]

    def resolve(self, length: int) -> Pattern:
        """The pattern for sequences of `length` keys, with everything drawn or looked up that depends on it.

        Raises:
            ValueError: the pattern speaks of positions that such a sequence doesn't have.
        """
        return self

    def to(self, device: torch.device) -> Pattern:
        """A resolved pattern with its tables on a device."""
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
    def reach(self) -> tuple[int, int] | None:
        """How many blocks a block of queries sees behind and ahead of it, where that is all the pattern says."""
        return None

    @property
    def by_distance(self) -> bool:
        """Whether i - j alone decides."""
        return False

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
            ValueError: no mapping, a negative head, or something that is no pattern.
        """
        if not isinstance(patterns, Mapping):
            raise ValueError(f"heads: expected a dictionary from heads to patterns, got {type(patterns).__name__}")
        for head, pattern in patterns.items():
            check_integer("heads", "a head", head, least=0, remedy="heads are counted from 0")
            if not isinstance(pattern, Pattern):
                raise ValueError(
                    f"heads: head {head} must get a pattern, got {pattern!r}; leave it out to keep this one"
                )
        return ByHead(self, tuple(sorted(patterns.items(), key=lambda item: item[0]))) if patterns else self

    def shift(self, offset: int) -> Pattern:
        """The same pattern for queries whose position 0 is `offset`: cached decoding.

        Raises:
            ValueError: a negative offset.
        """
        check_integer("shift", "offset", offset, least=0, remedy="it is the position of the first query")
        return Shifted(self, offset) if offset else self

    def dense(self, length: int) -> Tensor:
        """The definition: bool (L, L), or (H, L, L) after `.heads`.

        Raises:
            ValueError: a negative length, or more than `LARGEST_DENSE` pairs.
        """
        check_integer("dense", "length", length, least=0, remedy="it is the number of tokens")
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

    def keys_per_query(self, length: int) -> Tensor:
        """How many keys each query sees: int64 (L,), or (H, L) after `.heads`; never writes out L x L."""
        from subquad.patterns.counting import keys_per_query  # counting builds patterns of its own

        return keys_per_query(self, length)

    def density(self, length: int) -> float:
        """Visible pairs as a part of all L² pairs, the mean over heads; never writes out L x L.

        Raises:
            ValueError: no tokens.
        """
        check_integer("density", "length", length, least=1, remedy="without tokens there are no pairs")
        return float(self.keys_per_query(length).double().mean()) / length

    def mask_mod(self, length: int, *, device: torch.device | str = "cpu") -> MaskMod:
        """The pattern for sequences of `length` keys, as FlexAttention wants it.

        Args:
            length: number of keys.
            device: where positions will be.

        Returns:
            a function of example, head, query and key; positions may have any integer dtype.
        """
        resolved = self.resolve(length).to(torch.device(device))
        if not self.num_heads:
            return lambda example, head, query, key: resolved.visible(query.long(), key.long())
        heads = [resolved.of_head(head) for head in range(self.num_heads + 1)]  # the last one stands for all others
        distinct = list(dict.fromkeys(heads))
        owner = torch.tensor([distinct.index(pattern) for pattern in heads], device=device)

        def visible(example: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            mine = owner[head.clamp(max=len(heads) - 1)]
            query, key = query.long(), key.long()
            result = distinct[0].visible(query, key)
            for number, pattern in enumerate(distinct[1:], start=1):
                result = torch.where(mine == number, pattern.visible(query, key), result)
            return result

        return visible

    def __and__(self, other: Pattern) -> Pattern:
        """Visible in both."""
        return joined(And, self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        """Visible in either, counted once."""
        return joined(Or, self, other) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self) -> Pattern:
        """Visible where this pattern is not."""
        return Not(self)


from subquad.patterns.composition import And, ByHead, Not, Or, joined  # noqa: E402 - they derive from Pattern, whose operators make them
from subquad.patterns.shifted import Shifted  # noqa: E402 - likewise
