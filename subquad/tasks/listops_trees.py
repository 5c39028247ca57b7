"""Random ListOps expressions, many trees at once.

The recursion of Long Range Arena's generator, root depth 1: a node shallower than `max_depth` is an operator with
probability 1/4, else a leaf with a uniform digit; an operator has a uniform number of children in 2 .. max_args and is
uniform over MIN, MAX, MED, SM. An expression is kept if its token count (2 per operator, 1 per leaf) lies strictly
between the bounds. All draws of a tree are independent, so the official order (children before their operator) is of no
consequence for what is drawn; the official script sets no seed, hence there is no stream to reproduce.

Trees grow level by level in numpy: one 64-bit word per node decides everything about it, and a tree that has become too
long grows no further. Lengths and values are then folded upwards, positions in the sequence handed downwards. Only raw
words of PCG64 are used, which numpy promises to keep, while the methods of its `Generator` may change.

Does not look for duplicates and does not write files.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from subquad.tasks.listops_expression import MED, MIN, SM, symbols

OPERATORS = symbols[MIN - 1 : SM]
_CLOSE_PIECE = 10
_FIRST_OPERATOR_PIECE = 11
_MAX_ARGS_LIMIT = 60
"""Pieces of text are numbered in one byte: 10 digits, the bracket, and every operator with every number of children."""


@dataclass(frozen=True)
class Shape:
    """What bounds an expression.

    Attributes:
        longer_than: tokens, strict.
        shorter_than: tokens, strict.
        max_depth: nodes on the longest path; the deepest level has leaves only.
        max_args: most children of an operator.

    Raises:
        ValueError: if no expression can satisfy the bounds.
    """

    longer_than: int
    shorter_than: int
    max_depth: int
    max_args: int

    def __post_init__(self) -> None:
        if self.longer_than < 1:
            raise ValueError(f"longer_than must be at least 1 (a lone digit is no expression), got {self.longer_than}")
        if self.shorter_than - max(self.longer_than, 3) < 2:
            raise ValueError(
                f"no expression is longer than {self.longer_than} and shorter than {self.shorter_than} tokens: "
                "expected shorter_than of at least longer_than + 2, and of at least 5"
            )
        if self.max_depth < 2:
            raise ValueError(f"max_depth must be at least 2 (an operator and its digits), got {self.max_depth}")
        if not 2 <= self.max_args <= _MAX_ARGS_LIMIT:
            raise ValueError(f"max_args must be from 2 to {_MAX_ARGS_LIMIT}, got {self.max_args}")


@dataclass(frozen=True)
class _Level:
    """All nodes of one depth, those of the same tree and the same parent adjacent and in order.

    tree: int64, index of the node's tree. arity: int64, 0 for leaves. content: uint8, a leaf's digit or an operator's
    index in OPERATORS.
    """

    tree: np.ndarray
    arity: np.ndarray
    content: np.ndarray

    @property
    def is_operator(self) -> np.ndarray:
        return self.arity > 0

    def select(self, keep: np.ndarray) -> "_Level":
        return _Level(self.tree[keep], self.arity[keep], self.content[keep])


@dataclass(frozen=True)
class Expressions:
    """Finished expressions.

    Attributes:
        pieces: uint8, (sum of lengths,): one piece of text per token, an index into `text_pieces`.
        offsets: int64, (n + 1,), where each expression starts in `pieces`.
        values: int64, (n,), 0 .. 9.
    """

    pieces: np.ndarray
    offsets: np.ndarray
    values: np.ndarray

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        """Pieces of every expression as bytes, and its value."""
        buffer, offsets = self.pieces.tobytes(), self.offsets.tolist()
        for index, value in enumerate(self.values.tolist()):
            yield buffer[offsets[index] : offsets[index + 1]], value


def text_pieces(max_args: int) -> list[bytes]:
    """The text of each piece, with the parentheses and spaces of the released files.

    n children make n + 1 pairs, all opened before the operator: one is closed after each child, one after the bracket.
    """
    pieces = [b"%d ) " % digit for digit in range(10)]
    pieces.append(b"] ) ) ")
    for operator in OPERATORS:
        pieces += [b"( " * (arity + 1) + operator.encode() + b" " for arity in range(2, max_args + 1)]
    return pieces


def draw_expressions(words: np.random.PCG64, count: int, shape: Shape) -> Expressions:
    """Draw `count` trees and return those whose length lies between the bounds, in the order drawn."""
    levels, lengths = _grow(words, count, shape)
    accepted = (lengths > shape.longer_than) & (lengths < shape.shorter_than)
    levels = [level.select(accepted[level.tree]) for level in levels]
    offsets = np.concatenate([[0], np.cumsum(lengths[accepted])])
    node_lengths, node_values = _fold(levels)
    pieces = _lay_out(levels, node_lengths, offsets, shape.max_args)
    return Expressions(pieces, offsets, node_values[0].astype(np.int64))


def _grow(words: np.random.PCG64, count: int, shape: Shape) -> tuple[list[_Level], np.ndarray]:
    """Levels from the root down, and the length of every tree; those too long are cut off and incomplete."""
    levels = []
    lengths = np.ones(count, dtype=np.int64)
    tree = np.arange(count)
    for depth in range(1, shape.max_depth + 1):
        level = _draw_level(words, tree, depth < shape.max_depth, shape.max_args)
        levels.append(level)
        # A node counts 1 until it turns out to be an operator of n children, which makes it n + 2.
        growth = np.where(level.is_operator, level.arity + 1, 0)
        lengths += np.bincount(tree, weights=growth, minlength=count).astype(np.int64)
        children = np.where(lengths[tree] < shape.shorter_than, level.arity, 0)
        tree = np.repeat(tree, children)
    return levels, lengths


def _draw_level(words: np.random.PCG64, tree: np.ndarray, may_branch: bool, max_args: int) -> _Level:
    """One word per node: bits 63-62 say whether it is an operator, 61-30 its arity or digit, 1-0 which operator."""
    word = words.random_raw(len(tree))
    is_operator = (word >> np.uint64(62) == 0) & may_branch
    fraction = (word >> np.uint64(30)) & np.uint64(2**32 - 1)
    arity = 2 + (fraction * np.uint64(max_args - 1) >> np.uint64(32)).astype(np.int64)
    digit = fraction * np.uint64(10) >> np.uint64(32)
    content = np.where(is_operator, word & np.uint64(3), digit).astype(np.uint8)
    return _Level(tree, np.where(is_operator, arity, 0), content)


def _fold(levels: list[_Level]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token length (int64) and value (uint8) of every node, level by level, from the leaves up."""
    lengths: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for level in reversed(levels):
        length = np.ones(len(level.tree), dtype=np.int64)
        value = level.content.copy()
        if level.is_operator.any():
            arity = level.arity[level.is_operator]
            first = np.cumsum(arity) - arity
            length[level.is_operator] = 2 + np.add.reduceat(lengths[-1], first)
            value[level.is_operator] = _apply_operators(level.content[level.is_operator], values[-1], first, arity)
        lengths.append(length)
        values.append(value)
    return lengths[::-1], values[::-1]


def _apply_operators(operator: np.ndarray, values: np.ndarray, first: np.ndarray, arity: np.ndarray) -> np.ndarray:
    """Values of operators (index in OPERATORS, (n,)) whose arguments are `values[first:first + arity]`; uint8, (n,)."""
    minimum = np.minimum.reduceat(values, first)
    maximum = np.maximum.reduceat(values, first)
    total = np.add.reduceat(values, first, dtype=np.int64) % 10
    median = np.zeros_like(minimum)
    is_median = operator == MED - MIN
    median[is_median] = _medians(values, first[is_median], arity[is_median])
    return np.choose(operator, [minimum, maximum, median, total]).astype(np.uint8)


def _medians(values: np.ndarray, first: np.ndarray, arity: np.ndarray) -> np.ndarray:
    """Median of each `values[first:first + arity]`, two middle values averaged and rounded down; uint8, (n,)."""
    column = np.arange(arity.max(initial=0))
    inside = column < arity[:, None]
    index = np.minimum(first[:, None] + column, len(values) - 1)
    ordered = np.sort(np.where(inside, values[index], 255), axis=1)
    row = np.arange(len(arity))
    return (ordered[row, (arity - 1) // 2].astype(np.int64) + ordered[row, arity // 2]) // 2


def _lay_out(levels: list[_Level], lengths: list[np.ndarray], offsets: np.ndarray, max_args: int) -> np.ndarray:
    """Pieces of all expressions in reading order, from the positions of the roots down; uint8, (sum of lengths,)."""
    pieces = np.empty(offsets[-1], dtype=np.uint8)
    position = offsets[:-1]
    for depth, level in enumerate(levels):
        is_operator = level.is_operator
        kind = level.content.astype(np.int64) * (max_args - 1) + level.arity - 2 + _FIRST_OPERATOR_PIECE
        pieces[position] = np.where(is_operator, kind, level.content)
        start = position[is_operator]
        pieces[start + lengths[depth][is_operator] - 1] = _CLOSE_PIECE
        if not len(start):
            break
        child_lengths = lengths[depth + 1]
        arity = level.arity[is_operator]
        before = np.cumsum(child_lengths) - child_lengths
        first = np.cumsum(arity) - arity
        position = np.repeat(start + 1 - before[first], arity) + before
    return pieces
