"""Who sees whom, written as plain Python on single pairs, and random patterns that carry such a predicate with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from subquad.patterns import (
    Block,
    BlockWindow,
    Causal,
    Columns,
    Dilated,
    Documents,
    Global,
    Log,
    Ngram,
    Pattern,
    Random,
    Sink,
    Strided,
    Window,
)

Sees = Callable[[int, int], bool]


class Case(NamedTuple):
    """A pattern, and the predicate that it should be, for sequences of one length."""

    pattern: Pattern
    sees: Sees


def matrix(sees: Sees, queries: int, keys: int) -> Tensor:
    """The predicate on all pairs, one by one."""
    return torch.tensor([[sees(i, j) for j in range(keys)] for i in range(queries)], dtype=torch.bool).view(
        queries, keys
    )


def window(left: int, right: int) -> Case:
    return Case(Window(left, right), lambda i, j: i - left <= j <= i + right)


def dilated(left: int, right: int, dilation: int) -> Case:
    def sees(i: int, j: int) -> bool:
        return j in {i + dilation * step for step in range(-left, right + 1)}

    return Case(Dilated(left, right, dilation), sees)


def strided(stride: int) -> Case:
    return Case(Strided(stride), lambda i, j: abs(i - j) % stride == 0)


def ngram(n: int) -> Case:
    return Case(Ngram(n), lambda i, j: j in range(i - n + 2, i + 1))


def log() -> Case:
    return Case(Log(), lambda i, j: i == j or (i > j and (i - j).bit_count() == 1))


def block(size: int) -> Case:
    return Case(Block(size), lambda i, j: i // size == j // size)


def block_window(size: int, left: int, right: int) -> Case:
    def sees(i: int, j: int) -> bool:
        own = i // size
        return (own - left) * size <= j < (own + right + 1) * size

    return Case(BlockWindow(size, left, right), sees)


def columns(stride: int, count: int, offset: int) -> Case:
    def sees(i: int, j: int) -> bool:
        last = stride - 1 - offset
        return j % stride in range(last - count + 1, last + 1)

    return Case(Columns(stride, count, offset), sees)


def sink(count: int) -> Case:
    return Case(Sink(count), lambda i, j: j < count)


def chosen(index: set[int], rows: bool, cols: bool) -> Case:
    return Case(Global(sorted(index), rows, cols), lambda i, j: (cols and j in index) or (rows and i in index))


def documents(ids: list[int]) -> Case:
    return Case(Documents(ids), lambda i, j: i < len(ids) and j < len(ids) and ids[i] == ids[j])


def random_blocks(size: int, count: int, seed: int, exclude: Pattern | None, length: int) -> Case:
    """What was drawn is looked up; that it is drawn as it should be has tests of its own."""
    pattern = Random(size, count, seed, exclude)
    drawn: Any = getattr(pattern.resolve(length), "drawn").tolist()  # noqa: B009 - a field of Random alone
    return Case(pattern, lambda i, j: i // size < len(drawn) > j // size and j // size in drawn[i // size])


def leaves(length: int) -> st.SearchStrategy[Case]:
    """Every constructor, with small arguments."""
    few, size = st.integers(0, 7), st.integers(1, 7)
    place = st.integers(0, length - 1)
    exclude = st.sampled_from([None, Block(3), BlockWindow(4, 1, 1) | Global(0)])
    return st.one_of(
        st.just(Case(Causal(), lambda i, j: j <= i)),
        st.just(log()),
        st.builds(window, few, few),
        st.builds(dilated, few, few, size),
        st.builds(strided, size),
        st.builds(ngram, size),
        st.builds(block, size),
        st.builds(block_window, size, st.integers(0, 2), st.integers(0, 2)),
        size.flatmap(
            lambda stride: st.integers(1, stride).flatmap(
                lambda count: st.builds(columns, st.just(stride), st.just(count), st.integers(0, stride - count))
            )
        ),
        st.builds(sink, few),
        st.builds(chosen, st.sets(place, max_size=4), st.just(True), st.booleans()),
        st.builds(chosen, st.sets(place, max_size=4), st.just(False), st.just(True)),
        st.builds(documents, st.lists(st.integers(-3, 2), min_size=length, max_size=length)),
        st.builds(documents, st.lists(st.integers(-3, 2), min_size=length, max_size=length).map(sorted)),
        st.builds(random_blocks, size, st.integers(0, 3), st.integers(0, 5), exclude, st.just(length)),
    )


def both(first: Case, second: Case) -> Case:
    return Case(first.pattern & second.pattern, lambda i, j: first.sees(i, j) and second.sees(i, j))


def either(first: Case, second: Case) -> Case:
    return Case(first.pattern | second.pattern, lambda i, j: first.sees(i, j) or second.sees(i, j))


def without(case: Case) -> Case:
    return Case(~case.pattern, lambda i, j: not case.sees(i, j))


def shifted(case: Case, offset: int) -> Case:
    return Case(case.pattern.shift(offset), lambda i, j: case.sees(i + offset, j))


def compositions(length: int) -> st.SearchStrategy[Case]:
    """Constructors joined by |, &, ~ and shifted, for sequences of `length` keys."""
    return st.recursive(
        leaves(length),
        lambda inner: st.one_of(
            st.builds(both, inner, inner),
            st.builds(either, inner, inner),
            st.builds(without, inner),
            st.builds(shifted, inner, st.integers(0, 5)),
        ),
        max_leaves=5,
    )
