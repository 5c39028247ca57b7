"""The arithmetic of prices, by brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad import Cost
from subquad.costs import overtaking_length, visible_pairs, window_sides

BOUND = st.none() | st.integers(0, 12)


@given(length=st.integers(0, 10), left=BOUND, right=BOUND)
def test_visible_pairs_are_those_that_a_loop_counts(length: int, left: int | None, right: int | None) -> None:
    def sees(i: int, j: int) -> bool:
        return (left is None or i - j <= left) and (right is None or j - i <= right)

    pairs = sum(sees(i, j) for i in range(length) for j in range(length))
    assert visible_pairs(length, left=left, right=right) == pairs


def test_dense_and_causal_attention_see_what_they_should() -> None:
    assert visible_pairs(100) == 100**2
    assert visible_pairs(100, right=0) == 100 * 101 // 2


@pytest.mark.parametrize(("window", "causal", "sides"), [(1, False, (0, 0)), (5, False, (2, 2)), (4, True, (3, 0))])
def test_a_window_counts_the_keys_itself_included(window: int, causal: bool, sides: tuple[int, int]) -> None:
    assert window_sides("x", window, causal=causal) == sides


def test_an_even_two_sided_window_names_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"^mine: .* must be odd; got 8, use 7 or 9$"):
        window_sides("mine", 8, causal=False)


def test_costs_add_and_multiply_by_field() -> None:
    cost = Cost(flops=1, activation_bytes=2, state_bytes=3, parameters=4)
    assert cost + cost == 2 * cost == cost * 2
    assert 2 * cost == Cost(flops=2, activation_bytes=4, state_bytes=6, parameters=8)
    assert sum((cost, cost), Cost()) == 2 * cost


@given(rate=st.integers(1, 10_000), start=st.integers(0, 10_000))
def test_the_overtaking_length_is_the_first_at_which_the_quadratic_costs_as_much(rate: int, start: int) -> None:
    def quadratic(length: int) -> int:
        return length * length

    def linear(length: int) -> int:
        return start + rate * length

    found = overtaking_length(quadratic, linear)
    assert found is not None
    assert quadratic(found) >= linear(found)
    assert found == 1 or quadratic(found - 1) < linear(found - 1)


def test_what_stays_cheaper_overtakes_nowhere() -> None:
    assert overtaking_length(lambda length: length, lambda length: 2 * length) is None
    assert overtaking_length(lambda length: 2 * length, lambda length: length) == 1
    assert overtaking_length(lambda length: length * length, lambda length: 100 * length, limit=10) is None
