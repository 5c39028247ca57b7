import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad.records.metrics import METRICS, estimate, metric_kind


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_with_one_question_an_example_the_error_is_binomial(right: list[bool]) -> None:
    found = estimate([float(each) for each in right], [1] * len(right))
    share = sum(right) / len(right)
    assert found.value == pytest.approx(share)
    assert found.standard_error == pytest.approx(math.sqrt(share * (1 - share) / len(right)), abs=1e-12)


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(1, 9)), min_size=1, max_size=20), st.integers(2, 5))
def test_asking_the_same_thing_several_times_makes_nothing_more_certain(
    examples: list[tuple[float, int]], times: int
) -> None:
    totals, asked = [total for total, _ in examples], [count for _, count in examples]
    once = estimate(totals, asked)
    often = estimate([times * total for total in totals], [times * count for count in asked])
    assert often.value == pytest.approx(once.value)
    assert often.standard_error == pytest.approx(once.standard_error)


def test_examples_that_ask_nothing_do_not_count() -> None:
    assert estimate([3.0, 0.0, 1.0], [2, 0, 2]) == estimate([3.0, 1.0], [2, 2])
    with pytest.raises(ValueError, match="no example asks for anything"):
        estimate([0.0], [0])


@pytest.mark.parametrize(
    ("name", "written", "on_test", "label", "difference"),
    [
        ("accuracy", "61.3 ± 0.5 %", "61.3 ± 0.5 % test accuracy", "Test accuracy (%)", "1.2 points"),
        (
            "bits_per_byte",
            "0.613 ± 0.005 bits/byte",
            "0.613 ± 0.005 bits/byte on test",
            "Test bits per byte",
            "0.012 bits/byte",
        ),
        (
            "bits_per_dimension",
            "0.613 ± 0.005 bits/dim",
            "0.613 ± 0.005 bits/dim on test",
            "Test bits per dimension",
            "0.012 bits/dim",
        ),
    ],
)
def test_a_value_is_written_with_its_unit(name: str, written: str, on_test: str, label: str, difference: str) -> None:
    kind = metric_kind(name)
    assert kind.write(0.613, 0.005) == written
    assert kind.on_test(0.613, 0.005) == on_test
    assert kind.label("Test") == label
    assert kind.difference(0.012) == difference
    assert "±" not in kind.write(0.613)


def test_better_is_higher_for_shares_and_lower_for_bits() -> None:
    share, bits = metric_kind("accuracy"), metric_kind("bits_per_byte")
    assert share.goodness(0.7) > share.goodness(0.6)
    assert bits.goodness(1.6) > bits.goodness(1.7)
    assert (share.direction, bits.direction) == ("higher is better", "lower is better")
    assert (share.towards_better, bits.towards_better) == ("Up", "Down")


def test_an_unknown_metric_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown metric 'f1'; known: accuracy, bits_per_byte, bits_per_dimension"):
        metric_kind("f1")
    assert all(kind.name == name for name, kind in METRICS.items())


def test_what_can_not_be_a_value_is_refused() -> None:
    metric_kind("bits_per_byte").check(9.0)
    with pytest.raises(ValueError, match="bits_per_byte must be at least 0 and finite, got -1"):
        metric_kind("bits_per_byte").check(-1)
    with pytest.raises(ValueError, match=r"accuracy must be at least 0 and at most 1, got 1\.5"):
        metric_kind("accuracy").check(1.5)
