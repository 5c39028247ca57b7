import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad.records import units
from subquad.records.measures import Summary, pareto_front, speed_at
from subquad.records.queries import comparisons, mixer_labels, receipts_of
from subquad.records.schema import ProfileRecord, RunRecord, TaskInfo
from subquad.records.store import Records

MakeRun = Callable[..., RunRecord]
MakeProfile = Callable[..., ProfileRecord]


def bits_of(task: TaskInfo, value: float) -> dict[str, Any]:
    """What makes a run one of a task measured in bits per byte."""
    changed = {"objective": "causal_lm", "metric": "bits_per_byte", "num_labels": None}
    score = {"step": 10, "validation": value, "test": value, "test_standard_error": 0.01}
    metric = {"name": "bits_per_byte", "higher_is_better": False, "examples": 400, "asked": 40_000}
    return {"task": task.model_dump() | changed, "metric": {**metric, "best_validation": score, "last_step": score}}


@pytest.mark.parametrize(
    "change",
    [
        {"preset": "small"},
        {"budget": {"kind": "steps", "amount": 20}},
        {"budget": {"kind": "time", "amount": 10}},
        {"model": {"hidden_size": 128, "num_hidden_layers": 2}},
        {"model": {"hidden_size": 64, "num_hidden_layers": 4}},
    ],
)
def test_two_protocols_never_share_a_table(make_run: MakeRun, change: dict[str, object]) -> None:
    found = comparisons(Records(runs=(make_run("full"), make_run("local", **change))))
    assert [[entry.name for entry in comparison.entries] for comparison in found] in (
        [["full"], ["local"]],
        [["local"], ["full"]],
    )


def test_a_parameter_budget_sets_width_and_depth_free(make_run: MakeRun) -> None:
    budget = {"kind": "parameters", "amount": 1000}
    wide = make_run("local", budget=budget, model={"hidden_size": 128, "num_hidden_layers": 1})
    (comparison,) = comparisons(Records(runs=(make_run("full", budget=budget), wide)))
    assert [entry.name for entry in comparison.entries] == ["full", "local"]


def test_seeds_of_one_set_up_are_one_entry_in_order_of_the_seeds(make_run: MakeRun) -> None:
    runs = (make_run("local", 1, 0.4), make_run("local", 0, 0.6))
    ((entry,),) = (comparison.entries for comparison in comparisons(Records(runs=runs)))
    assert entry.best is not None
    assert entry.best.values == (0.6, 0.4)
    assert entry.best.mean == pytest.approx(0.5)
    assert entry.best.standard_error == pytest.approx(math.sqrt(0.02 / 2))


def test_a_single_seed_has_the_error_of_the_test_split() -> None:
    summary = Summary((0.2,), (0.04,))
    assert summary.standard_error == summary.cautious_error == pytest.approx(0.04)


def test_seeds_that_agree_by_chance_keep_the_error_of_the_test_split() -> None:
    summary = Summary((0.2, 0.2), (0.03, 0.0479583))
    assert summary.standard_error == 0
    assert summary.cautious_error == pytest.approx(0.04)


def test_rows_are_dense_first_then_by_accuracy_and_failures_last(make_run: MakeRun) -> None:
    failed = make_run("aft", status="failed", message="no", metric=None)
    runs = (failed, make_run("local", 0, 0.4), make_run("linear", 0, 0.6), make_run("full", 0, 0.3))
    (comparison,) = comparisons(Records(runs=runs))
    assert [entry.name for entry in comparison.entries] == ["full", "linear", "local", "aft"]
    assert comparison.dense is comparison.entries[0]
    assert comparison.entries[3].status == "failed"
    assert comparison.entries[3].reason == "failed: no"


def test_a_failed_seed_is_counted_and_the_other_keeps_its_figure(make_run: MakeRun) -> None:
    diverged = make_run("local", 1, status="diverged", message="loss not finite", metric=None)
    ((entry,),) = (c.entries for c in comparisons(Records(runs=(make_run("local", 0), diverged))))
    assert entry.status == "1 of 2 ok"
    assert entry.reason == "1 of 2 seeds diverged: loss not finite"
    assert entry.best is not None
    assert not entry.clean


def test_a_red_probe_takes_all_figures(make_run: MakeRun, make_profile: MakeProfile) -> None:
    red = make_run("local", probes=[{"name": "leak", "passed": False, "detail": "y[1]", "seconds": 0}])
    records = Records(runs=(red,), profiles=(make_profile("local", {1000: (1, 2)}),))
    ((entry,),) = (comparison.entries for comparison in comparisons(records))
    assert (entry.best, entry.last, entry.speed) == (None, None, None)
    assert entry.reason == "red probe: leak (y[1])"


@pytest.mark.parametrize(("name", "label"), [("majority_class", "majority class"), ("unigram", "unigram")])
def test_the_guess_joins_every_comparison_of_its_data(make_run: MakeRun, name: str, label: str) -> None:
    guess = make_run(name, 0, 0.3, model={}, parameters=0, placement="none")
    runs = (guess, make_run("full"), make_run("full", preset="small"))
    found = comparisons(Records(runs=runs))
    assert [(comparison.guess_label, comparison.guess_score) for comparison in found] == [(label, 0.3), (label, 0.3)]


def test_fewer_bits_stand_above_more(make_run: MakeRun) -> None:
    scores = {"full": 2.5, "local": 2.0, "aft": 1.5}
    runs = tuple(make_run(name, **bits_of(make_run().task, bits)) for name, bits in scores.items())
    (comparison,) = comparisons(Records(runs=runs))
    assert [entry.name for entry in comparison.entries] == ["full", "aft", "local"]
    assert not comparison.kind.higher_is_better


def test_the_quick_preset_is_never_long_range_arena(make_run: MakeRun) -> None:
    task = make_run().task.model_dump() | {"is_lra": True}
    runs = (make_run(task=task), make_run(task=task, preset="base"))
    assert {c.protocol.preset: c.is_lra for c in comparisons(Records(runs=runs))} == {"quick": False, "base": True}


@pytest.mark.parametrize(("parameters", "marked"), [(1100, False), (1101, True), (900, False), (899, True)])
def test_parameters_more_than_a_tenth_away_are_marked(make_run: MakeRun, parameters: int, marked: bool) -> None:
    ((entry,),) = (c.entries for c in comparisons(Records(runs=(make_run(parameters=parameters),))))
    assert entry.unequal_parameters is marked


@pytest.mark.parametrize("change", [{"embed_dim": 128}, {"mixer": {"name": "local", "window": 3}}])
def test_a_profile_of_another_set_up_is_not_used(
    make_run: MakeRun, make_profile: MakeProfile, change: dict[str, object]
) -> None:
    records = Records(runs=(make_run("local"),), profiles=(make_profile("local", {1000: (1, 2)}, **change),))
    assert comparisons(records)[0].entries[0].profile is None


def test_speed_is_interpolated_log_log_and_never_extrapolated(make_profile: MakeProfile) -> None:
    profile = make_profile("local", {256: (2, 1), 1024: (8, 16)})
    speed = speed_at(profile, 512)
    assert speed is not None
    assert (speed.seconds, speed.dense_seconds) == (pytest.approx(0.004), pytest.approx(0.004))
    assert speed.relative == pytest.approx(1)
    assert speed_at(profile, 128) is None
    assert speed_at(profile, 2048) is None


def test_labels_name_the_options_only_where_they_differ(make_run: MakeRun) -> None:
    one = make_run(mixer={"name": "local", "window": 3, "block": 1})
    other = make_run(mixer={"name": "local", "window": 5, "block": 1})
    labels = mixer_labels(Records(runs=(one, other, make_run("full"))))
    assert sorted(labels.values()) == ["full", "local window=3", "local window=5"]


def test_equal_receipts_are_added_up(make_run: MakeRun) -> None:
    receipt = {"where": "a", "asked": "b", "ran": "c", "reason": "d", "count": 2}
    (found,) = receipts_of([make_run(receipts=[receipt]), make_run(receipts=[receipt])])
    assert found.count == 4


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_a_point_is_on_the_front_unless_another_is_better(points: list[tuple[float, ...]]) -> None:
    front = pareto_front(points)
    assert front
    for index, point in enumerate(points):
        better = [q for q in points if q != point and all(a >= b for a, b in zip(q, point, strict=True))]
        assert (index in front) is (not better)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (units.seconds(0.0123), "12.3 ms"),
        (units.seconds(0.00085), "850 µs"),
        (units.seconds(200), "3 min 20 s"),
        (units.seconds(7500), "2 h 05 min"),
        (units.seconds(172_740), "47 h 59 min"),
        (units.seconds(172_800), "2 days 0 h"),
        (units.seconds(31_394 * 60), "21 days 19 h"),
        (units.seconds(2e8), "2,314 days 20 h"),
        (units.seconds(0), "0 s"),
        (units.size(45_000_000), "45.0 MB"),
        (units.size(999_900), "1.00 MB"),
        (units.size(12), "12 B"),
        (units.magnitude(1_200_000), "1.20M"),
        (units.count(131402), "131,402"),
        (units.times(0.734), "0.73×"),
    ],
)
def test_quantities_are_written_for_a_reader(written: str, expected: str) -> None:
    assert written == expected
