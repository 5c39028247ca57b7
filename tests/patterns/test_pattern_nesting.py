"""Which patterns contain which, and what two steps of the Sparse Transformer's patterns reach."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_pattern_counts import bigbird

from subquad.patterns import Block, BlockWindow, Causal, Columns, Dilated, Ngram, Pattern, Sink, Strided, Window

LENGTH = 40


def contains(outer: Pattern, inner: Pattern) -> bool:
    return not (inner & ~outer).dense(LENGTH).any()


def same(first: Pattern, second: Pattern) -> bool:
    return torch.equal(first.dense(LENGTH), second.dense(LENGTH))


@given(st.integers(1, 12))
def test_n_grams_nest_and_are_causal(n: int) -> None:
    assert contains(Ngram(n + 1), Ngram(n))
    assert not contains(Ngram(n), Ngram(n + 1))
    assert contains(Causal(), Ngram(n + 1))


@given(st.integers(0, 9), st.integers(0, 9))
def test_a_dilation_of_one_is_a_window(left: int, right: int) -> None:
    assert same(Dilated(left, right, 1), Window(left, right))


@given(st.integers(1, 12))
def test_blocks_and_windows_nest(size: int) -> None:
    neighbours = BlockWindow(size, 1, 1)
    assert contains(neighbours, Block(size))
    assert contains(neighbours, Window(size, size))
    assert not contains(neighbours, Window(size + 1, size))
    assert contains(Window(2 * size - 1, 2 * size - 1), neighbours)
    assert same(BlockWindow(size, 0, 0), Block(size))


@given(st.integers(1, 12))
def test_a_stride_of_one_and_columns_that_fill_the_stride_are_everything(stride: int) -> None:
    assert Strided(1).dense(LENGTH).all()
    assert Columns(stride, stride).dense(LENGTH).all()
    assert not Sink(0).dense(LENGTH).any()


def test_bigbird_contains_its_window_of_blocks() -> None:
    assert contains(bigbird(LENGTH, 4, 2), BlockWindow(4, 1, 1))
    assert contains(bigbird(LENGTH, 4, 2), bigbird(LENGTH, 4, 0))


@pytest.mark.parametrize("stride", [2, 5, 8])
def test_two_steps_of_the_strided_patterns_reach_the_whole_past_in_either_order(stride: int) -> None:
    local = (Causal() & Window(stride - 1, 0)).dense(LENGTH).double()
    summary = (Causal() & Strided(stride)).dense(LENGTH).double()
    past = Causal().dense(LENGTH)
    assert torch.equal(summary @ local > 0, past)
    assert torch.equal(local @ summary > 0, past)


@pytest.mark.parametrize(("stride", "count"), [(5, 1), (8, 3)])
def test_two_steps_of_the_fixed_patterns_reach_the_whole_past_only_with_the_residual_path(
    stride: int, count: int
) -> None:
    local = (Causal() & Block(stride)).dense(LENGTH).double()
    summary = (Causal() & Columns(stride, count)).dense(LENGTH).double()
    past, own = Causal().dense(LENGTH), torch.eye(LENGTH, dtype=torch.float64)
    for first, second in ((local, summary), (summary, local)):
        assert not torch.equal(second @ first > 0, past)
    assert torch.equal((summary + own) @ (local + own) > 0, past)
