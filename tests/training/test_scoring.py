import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subquad.labels import IGNORED
from subquad.records.metrics import metric_kind
from subquad.training.scoring import bits, bucket_bounds, measure, right_answers, score_of, sum_up

LABELS = torch.tensor([[0, 2, IGNORED, 1, 1], [IGNORED] * 5])


def logits() -> torch.Tensor:
    return torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_bits_are_minus_the_logarithm_of_the_probability() -> None:
    given_logits = logits()
    found = bits(given_logits, LABELS)
    probabilities = given_logits.softmax(dim=-1)
    for position in (0, 1, 3, 4):
        expected = -math.log2(probabilities[0, position, LABELS[0, position]])
        assert found[0, position] == pytest.approx(expected)


def test_each_metric_adds_up_its_own() -> None:
    assert score_of(metric_kind("accuracy")) is right_answers
    assert score_of(metric_kind("bits_per_byte")) is score_of(metric_kind("bits_per_dimension")) is bits


def test_what_is_not_asked_is_not_scored() -> None:
    sums = sum_up(right_answers, logits(), LABELS, bucket_bounds(6), start=1)
    hits = (logits().argmax(dim=-1) == LABELS)[0]
    assert sums.asked.tolist() == [4, 0]
    assert sums.totals.tolist() == [float(hits[[0, 1, 3, 4]].sum()), 0.0]
    assert sums.asked_by_bucket.tolist() == [[1, 1, 2], [0, 0, 0]]
    assert sums.totals_by_bucket[0].tolist() == [hits[0], hits[1], hits[3] + hits[4]]


def test_rows_of_a_stream_stand_at_positions_of_their_own() -> None:
    labels = torch.tensor([[0, 2, 1, 1], [1, 1, 0, IGNORED]])
    sums = sum_up(right_answers, logits()[:, :4], labels, bucket_bounds(8), start=torch.tensor([4, 1]))
    hits = (logits().argmax(dim=-1)[:, :4] == labels).double()
    assert sums.asked_by_bucket.tolist() == [[0, 0, 4], [1, 2, 0]]
    assert sums.totals_by_bucket.tolist() == [[0, 0, hits[0].sum()], [hits[1, 0], hits[1, 1:3].sum(), 0]]


@given(st.integers(0, 100))
def test_buckets_double_and_hold_every_position_once(length: int) -> None:
    bounds = bucket_bounds(length)
    assert [place for first, last in bounds for place in range(first, last + 1)] == list(range(1, length))
    assert all(last < 2 * first for first, last in bounds)


def test_a_split_is_measured_by_the_sums_of_its_examples() -> None:
    found = measure(
        np.array([1.0, 2.0, 0.0]),
        np.array([2, 3, 0]),
        np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]]),
        np.array([[2, 0], [3, 0], [0, 0]]),
        ((1, 1), (2, 3)),
    )
    assert found.estimate.value == pytest.approx(0.6)
    assert (found.examples, found.asked) == (2, 5)
    assert found.by_position == ((1, 1, 5, pytest.approx(0.6)),)
