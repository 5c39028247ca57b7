import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad.training.order import Order, ShuffledOrder, SortedOrder, StreamOrder, Visit, WholeStreamOrder, Windows

CONTINUES = st.lists(st.booleans(), min_size=1, max_size=40).map(lambda rest: np.array([False, *rest]))


def windows(continues: np.ndarray) -> Windows:
    """Of 1, 2, 3, 1, 2, 3 ... tokens."""
    return Windows(continues, np.concatenate(([0], np.cumsum([1 + index % 3 for index in range(len(continues))]))))


def visits(order: Order) -> list[Visit]:
    return [order[place] for place in range(len(order))]


@given(st.integers(1, 20), st.integers(0, 5))
def test_every_pass_sees_each_example_once_in_an_order_of_its_own(examples: int, seed: int) -> None:
    seen = visits(ShuffledOrder(examples, 3 * examples, seed))
    for number in range(3):
        of_pass = seen[number * examples : (number + 1) * examples]
        assert sorted(visit.example for visit in of_pass) == list(range(examples))
        assert {visit.number for visit in of_pass} == {number}


def test_an_order_is_a_function_of_seed_and_place_alone() -> None:
    order = ShuffledOrder(20, 60, 1)
    forwards = visits(order)
    assert [order[place] for place in reversed(range(60))] == forwards[::-1]
    assert forwards[:20] != forwards[20:40]
    assert forwards != visits(ShuffledOrder(20, 60, 2))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_sorting_by_length_loses_and_repeats_no_example(lengths: list[int]) -> None:
    seen = [visit.example for visit in visits(SortedOrder(np.array(lengths)))]
    assert sorted(seen) == list(range(len(lengths)))
    assert [lengths[example] for example in seen] == sorted(lengths)


@given(CONTINUES, st.integers(1, 4), st.integers(0, 3))
def test_a_row_is_carried_where_the_same_document_stood_in_it_before(
    continues: np.ndarray, rows: int, seed: int
) -> None:
    if len(continues) < rows:
        with pytest.raises(ValueError, match=f"stream: {rows} rows need at least as many windows to train on"):
            StreamOrder(windows(continues), rows, 8, seed)
        return
    seen = visits(StreamOrder(windows(continues), rows, 6 * len(continues) * rows, seed))
    for place, visit in enumerate(seen):
        before = seen[place - rows] if place >= rows else None
        expected = 0
        if before is not None and (before.number, before.example) == (visit.number, visit.example - 1):
            expected = int(continues[visit.example]) * (before.before + 1 + before.example % 3)
        assert visit.before == expected
    first_pass = [visit.example for visit in seen if visit.number == 0]
    assert len(set(first_pass)) == len(first_pass) == len(continues) // rows * rows


@given(CONTINUES, st.integers(1, 5))
def test_an_evaluation_asks_for_every_window_once(continues: np.ndarray, rows: int) -> None:
    seen = visits(WholeStreamOrder(windows(continues), rows))
    assert sorted(visit.example for visit in seen if visit.asked) == list(range(len(continues)))
    width = min(rows, len(continues))
    assert len(seen) % width == 0
    for place, visit in enumerate(seen):
        if visit.before:
            last = seen[place - width]
            assert (last.example, last.before) == (visit.example - 1, visit.before - 1 - last.example % 3)
            assert continues[visit.example]
    ends = [visit.before + 1 + visit.example % 3 for visit in seen if visit.asked]
    assert WholeStreamOrder(windows(continues), rows).longest == max(ends)
