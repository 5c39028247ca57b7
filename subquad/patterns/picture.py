"""The picture of a pattern: a square of queries and keys for each head, a colour for each part of a union.

A pattern of parts, `Causal() & (Window(7, 0) | Strided(8))`, is drawn part by part, in the order in which they stand; a
pair that several parts show has the colour of the first. Nothing but torch and numpy is needed.
"""

from __future__ import annotations

from functools import singledispatch
from typing import NamedTuple

from subquad.drawing import LONGEST, Drawing, Layer, Panel
from subquad.patterns.bands import Band
from subquad.patterns.blocks import BlockBand, Random
from subquad.patterns.composition import And, Compound, Or
from subquad.patterns.expression import write_pattern
from subquad.patterns.pattern import Pattern
from subquad.patterns.terms import UNBOUNDED
from subquad.patterns.tokens import Columns, Documents, Global, Sink

LENGTH = 48
"""Tokens of a picture, where the pattern doesn't need more."""
REPEATS = 4
"""How many windows, strides or blocks a picture has room for, where they are large."""


class Union(NamedTuple):
    """What a pattern is the union of, and the patterns that hold for all of it."""

    parts: tuple[Pattern, ...]
    conditions: tuple[Pattern, ...] = ()


def draw_pattern(pattern: Pattern, length: int | None = None) -> Drawing:
    """Draw who attends whom; heads with patterns of their own stand side by side.

    Args:
        pattern: any pattern.
        length: tokens, 1 to `LONGEST`; by default as many as show the structure.

    Raises:
        ValueError: a length out of range, or positions in the pattern that such a sequence doesn't have.
    """
    tokens = picture_length(pattern) if length is None else length
    if not 1 <= tokens <= LONGEST:
        raise ValueError(f"a picture of who attends whom has 1 to {LONGEST} tokens, got {tokens}")
    heads = range(pattern.num_heads)
    titles = [f"head {head}" for head in heads] or [""]
    unions = [_union(pattern.of_head(head)) for head in heads] or [_union(pattern)]
    panels = tuple(Panel(title, _layers(union, tokens)) for title, union in zip(titles, unions, strict=True))
    conditions = unions[0].conditions if all(union.conditions == unions[0].conditions for union in unions) else ()
    return Drawing(panels, f"within {write_pattern(_all(conditions))}" if conditions else "")


def picture_length(pattern: Pattern) -> int:
    """As many tokens as show the structure of the pattern: 48, more for large windows or blocks, at most `LONGEST`."""
    leaves = _leaves(pattern)
    documents = [len(leaf.ids) for leaf in leaves if isinstance(leaf, Documents)]
    return documents[0] if documents else min(max(LENGTH, *map(_room, leaves)), LONGEST)


def _union(pattern: Pattern) -> Union:
    """The parts of a union, or of the one union in a conjunction; else the pattern itself."""
    if isinstance(pattern, Or):
        return Union(pattern.parts)
    if isinstance(pattern, And):
        unions = [part for part in pattern.parts if isinstance(part, Or)]
        if len(unions) == 1:
            return Union(unions[0].parts, tuple(part for part in pattern.parts if part is not unions[0]))
    return Union((pattern,))


def _all(conditions: tuple[Pattern, ...]) -> Pattern:
    return conditions[0] if len(conditions) == 1 else And(conditions)


def _layers(union: Union, length: int) -> tuple[Layer, ...]:
    """A layer for each part, without what an earlier one shows already."""
    layers, allowed = [], _all(union.conditions).dense(length) if union.conditions else None
    for part in union.parts:
        visible = part.dense(length) if allowed is None else part.dense(length) & allowed
        rows = tuple("".join("01"[seen] for seen in row) for row in visible.tolist())
        layers.append(Layer(write_pattern(part), rows))
        allowed = ~visible if allowed is None else allowed & ~visible
    return tuple(layers)


def _leaves(pattern: Pattern) -> list[Pattern]:
    """The patterns that this one is composed of."""
    return [leaf for part in pattern.inner for leaf in _leaves(part)] if isinstance(pattern, Compound) else [pattern]


@singledispatch
def _room(pattern: Pattern) -> int:
    """Tokens that a leaf needs to show its structure."""
    return 1


@_room.register
def _(pattern: Band) -> int:
    sizes = (abs(pattern.term.low), abs(pattern.term.high), pattern.term.modulus)
    return REPEATS * max(size for size in sizes if size < UNBOUNDED)


@_room.register
def _(pattern: BlockBand | Random) -> int:
    return REPEATS * pattern.size


@_room.register
def _(pattern: Columns) -> int:
    return REPEATS * pattern.stride


@_room.register
def _(pattern: Sink) -> int:
    return REPEATS * pattern.count


@_room.register
def _(pattern: Global) -> int:
    return 1 + max(pattern.index, default=0)
