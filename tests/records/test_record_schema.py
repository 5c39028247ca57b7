import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from subquad.records.mechanisms import Picture
from subquad.records.schema import ProfileRecord, RunRecord, Timing, utc_now
from subquad.records.scores import CurvePoint, Metric, PositionBucket, Score

MakeRun = Callable[..., RunRecord]
MakeProfile = Callable[..., ProfileRecord]


def score(value: float) -> Score:
    return Score(step=1, validation=value, test=value, test_standard_error=0.1)


def bucket(first: int, last: int, value: float = 0.5) -> PositionBucket:
    return PositionBucket(first=first, last=last, asked=1, value=value)


def test_a_run_survives_the_way_to_json_and_back(make_run: MakeRun) -> None:
    run = make_run("local", 3, probes=[{"name": "leak", "passed": False, "detail": "y[1]", "seconds": 0.1}])
    assert RunRecord.model_validate_json(run.model_dump_json()) == run


def test_a_profile_survives_the_way_to_json_and_back(make_profile: MakeProfile) -> None:
    profile = make_profile("local", {256: (2, 1), 512: (2, 4)})
    assert ProfileRecord.model_validate_json(profile.model_dump_json()) == profile


def test_a_loss_that_is_not_finite_is_kept_as_null() -> None:
    point = CurvePoint(step=1, train_loss=math.nan)
    assert point.train_loss is None
    assert '"train_loss":null' in point.model_dump_json()


def test_the_name_of_the_mixer_comes_first(make_run: MakeRun) -> None:
    assert list(make_run(mixer={"window": 129, "name": "local"}).mixer) == ["name", "window"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"created": "2026-11-22T04:30:00"}, "expected a moment in UTC"),
        ({"created": "2026-11-22T04:30:00+02:00"}, "expected a moment in UTC"),
        ({"mixer": {"window": 3}}, 'with its "name" first'),
        ({"metric": None}, "a run with status 'ok' needs a metric"),
        ({"status": "diverged"}, "needs a message that says what happened"),
        ({"preset": "../quick"}, "should match pattern"),
        ({"surprise": 1}, "Extra inputs are not permitted"),
        ({"seed": "0"}, "valid integer"),
        ({"train_seconds": None}, "valid number"),
    ],
)
def test_an_impossible_run_is_refused(make_run: MakeRun, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_run(**changes)


def test_points_must_be_of_increasing_length(make_profile: MakeProfile) -> None:
    with pytest.raises(ValidationError, match=r"expected points of increasing length, got the lengths \[512, 256\]"):
        make_profile("local", {512: (1, 1), 256: (1, 1)})


def test_a_profile_without_points_is_not_ok(make_profile: MakeProfile) -> None:
    with pytest.raises(ValidationError, match="needs at least one point"):
        make_profile("local", {})


def test_a_picture_must_be_square_and_binary() -> None:
    with pytest.raises(ValidationError, match='expected 2 rows of 2 characters "0" or "1"'):
        Picture(length=2, rows=("01", "0x"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "f1"}, "unknown metric 'f1'; known: accuracy, bits_per_byte"),
        ({"higher_is_better": False}, "accuracy: higher is better, got higher_is_better=False"),
        ({"best_validation": score(1.2)}, "accuracy must be at least 0 and at most 1, got 1.2"),
        ({"last_step": score(1.2)}, "accuracy must be at least 0 and at most 1, got 1.2"),
        ({"by_position": (bucket(0, 0, 1.5),)}, "accuracy must be at least 0 and at most 1, got 1.5"),
        ({"by_position": (bucket(0, 3), bucket(3, 4))}, r"increasing positions, got \[0, 4, 3, 5\]"),
    ],
)
def test_an_impossible_metric_is_refused(changes: dict[str, Any], message: str) -> None:
    whole = {"name": "accuracy", "higher_is_better": True, "examples": 10, "asked": 10}
    whole |= {"best_validation": score(0.2), "last_step": score(0.2), "by_position": (bucket(0, 0), bucket(1, 2))}
    Metric(**whole)
    with pytest.raises(ValidationError, match=message):
        Metric(**(whole | changes))


def test_the_metric_is_that_of_the_task(make_run: MakeRun) -> None:
    task = make_run().task.model_dump() | {"metric": "bits_per_byte"}
    with pytest.raises(ValidationError, match="the task is measured by bits_per_byte, got the metric accuracy"):
        make_run(task=task)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=200))
def test_the_median_lies_between_the_quartiles(samples: list[float]) -> None:
    timing = Timing(samples_seconds=tuple(samples))
    first, third = timing.quartiles_seconds
    assert first <= timing.median_seconds * (1 + 1e-9)
    assert timing.median_seconds <= third * (1 + 1e-9)
    assert timing.interquartile_seconds == third - first


def test_more_than_200_samples_are_refused() -> None:
    with pytest.raises(ValidationError, match="at most 200 items"):
        Timing(samples_seconds=(1.0,) * 201)


@pytest.mark.parametrize(
    ("milliseconds", "crossover"),
    [
        ({256: (4, 1), 1024: (4, 16)}, 512.0),
        ({256: (1, 2), 1024: (2, 8)}, 256.0),
        ({256: (4, 1), 1024: (9, 8)}, None),
        ({256: (1, 2), 512: (4, 1), 1024: (4, 4), 2048: (4, 16)}, 1024.0),
        ({256: (1, 2), 1024: (8, 2)}, None),
    ],
    ids=["crosses once", "always faster", "never faster", "crosses twice, the last counts", "loses at the end"],
)
def test_the_crossover_is_where_the_mechanism_stays_faster(
    make_profile: MakeProfile, milliseconds: dict[int, tuple[float, float]], crossover: float | None
) -> None:
    found = make_profile("local", milliseconds).crossover_length
    assert found == (None if crossover is None else pytest.approx(crossover))


def test_a_failed_profile_has_no_crossover(make_profile: MakeProfile) -> None:
    assert make_profile("local", {}, status="out of memory", message="at 256").crossover_length is None


def test_the_present_moment_is_accepted_as_created(make_run: MakeRun) -> None:
    assert make_run(created=utc_now()).created.endswith("+00:00")
