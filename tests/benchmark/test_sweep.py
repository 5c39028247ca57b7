"""A sweep chooses by validation among equally many trials, keeps what it has, and hides no failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from stand_ins import InProcess, Recorder

from subquad.benchmark import proving, runs
from subquad.benchmark.grid import make_trials, read_axes
from subquad.benchmark.plan import RunPlan
from subquad.benchmark.recommendation import recommend
from subquad.benchmark.request import Request
from subquad.benchmark.runner import not_trained_record
from subquad.benchmark.sweep import SweepResult, Tuned, plan_sweep, sweep, sweep_record
from subquad.records.metrics import METRICS
from subquad.records.queries import comparisons
from subquad.records.schema import RunRecord, Status
from subquad.records.scores import Metric, Score
from subquad.records.store import read_all
from subquad.tasks.kinds import ClassificationData

Scores = Mapping[tuple[str, float, int], tuple[float, float] | None]
"""Validation and test score by mechanism, learning rate and seed; None for a run that diverges."""


class StoppedError(BaseException):
    """Passes through everything, as an interrupt does."""


class Trainer:
    """Stands for the training: gives the scores that were laid down, and keeps what it was called for."""

    def __init__(self, scores: Scores) -> None:
        self.scores = scores
        self.called: list[tuple[str, float, int]] = []
        self.stops_after = 1000

    def __call__(self, plan: RunPlan, data: ClassificationData, *others: object) -> RunRecord:
        if len(self.called) == self.stops_after:
            raise StoppedError
        key = (plan.mixer.config.name, plan.preset.training.learning_rate, plan.seed)
        self.called.append(key)
        scores = self.scores.get(key, (0.5, 0.5))
        record = not_trained_record(plan, data, Status.DIVERGED, "the loss is not finite")
        if scores is None:
            return record
        score = Score(step=8, validation=scores[0], test=scores[1], test_standard_error=0.01)
        metric = Metric(
            name="accuracy", higher_is_better=True, examples=60, asked=60, best_validation=score, last_step=score
        )
        return record.model_copy(update={"status": Status.OK, "message": "", "metric": metric})


Sweep = Callable[..., SweepResult]


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """No worker process, no proofs, no training: they have their own tests."""
    trainer = Trainer({})
    monkeypatch.setattr(runs, "Worker", InProcess)
    monkeypatch.setattr(proving, "run_probes", lambda config, dims: [])
    monkeypatch.setattr(runs, "execute", trainer)
    return trainer


@pytest.fixture
def run(
    request_of: Callable[..., Request], tiny_data: ClassificationData, observer: Recorder, trainer: Trainer
) -> Sweep:
    def make(*mixers: str, grid: tuple[str, ...] = ("learning_rate=1e-3,1e-4",), **options: Any) -> SweepResult:
        request = request_of(*mixers, **options)
        return sweep(request, make_trials(read_axes(grid), request.mixers, request.preset), tiny_data, observer)

    return make


def of(result: SweepResult, name: str) -> Tuned:
    (found,) = [tuned for tuned in result.tuned if tuned.mechanism == name]
    return found


def test_the_validation_score_chooses_and_the_test_score_is_looked_up(run: Sweep, trainer: Trainer) -> None:
    trainer.scores = {("linear", 1e-3, 0): (0.7, 0.6), ("linear", 1e-4, 0): (0.6, 0.9)}
    best = of(run("linear"), "linear").best
    assert best is not None
    assert (best.trial.settings, best.entry.validation) == ({"learning_rate": 1e-3}, 0.7)
    assert best.entry.best is not None
    assert best.entry.best.values == (0.6,)


def test_the_mean_over_the_seeds_chooses_and_the_earliest_of_equals(run: Sweep, trainer: Trainer) -> None:
    trainer.scores = {
        **{("linear", rate, seed): (score, 0.5) for rate, seed, score in ((1e-3, 0, 0.9), (1e-3, 1, 0.2))},
        **{("linear", 1e-4, seed): (0.6, 0.5) for seed in (0, 1)},
    }
    result = run("linear", seeds=(0, 1))
    linear, full = of(result, "linear").best, of(result, "full").best
    assert linear is not None
    assert (linear.trial.settings["learning_rate"], linear.entry.validation) == (1e-4, pytest.approx(0.6))
    assert full is not None
    assert full.trial.settings["learning_rate"] == 1e-3


def test_a_trial_with_a_seed_that_failed_is_shown_and_not_chosen(run: Sweep, trainer: Trainer) -> None:
    trainer.scores = {("linear", 1e-3, 0): (0.9, 0.9), ("linear", 1e-3, 1): None}
    linear = of(run("linear", seeds=(0, 1)), "linear")
    assert linear.best is not None
    assert linear.best.trial.settings == {"learning_rate": 1e-4}
    (failed,) = linear.failed
    assert failed.entry.label == "linear learning_rate=0.001"
    assert failed.entry.reason == "1 of 2 seeds diverged: the loss is not finite"


def test_a_mechanism_without_a_trial_that_ended_well_stands_last_and_can_not_win(run: Sweep, trainer: Trainer) -> None:
    failing = {("linear", rate, 0): None for rate in (1e-3, 1e-4)}
    trainer.scores = {**failing, ("performer", 1e-4, 0): (0.8, 0.8)}
    result = run("linear", "performer")
    assert [tuned.mechanism for tuned in result.tuned] == ["full", "performer", "linear"]
    assert of(result, "linear").best is None
    assert [entry.label for entry in result.comparison.entries] == [
        "full learning_rate=0.001",
        "performer learning_rate=0.0001",
    ]
    winner = recommend(result.comparison).winner
    assert winner is not None
    assert winner.label == "performer learning_rate=0.0001"


def test_where_fewer_is_better_the_least_is_chosen(run: Sweep, trainer: Trainer) -> None:
    trainer.scores = {("linear", 1e-3, 0): (0.7, 0.7), ("linear", 1e-4, 0): (0.6, 0.6)}
    found = replace(of(run("linear"), "linear"), kind=METRICS["bits_per_byte"]).best
    assert found is not None
    assert found.entry.validation == 0.6


def test_the_best_of_three_numbers_is_told_when_it_is_at_the_edge(run: Sweep, trainer: Trainer) -> None:
    trainer.scores = {
        ("full", 1e-3, 0): (0.7, 0.7),
        ("linear", 1e-4, 0): (0.7, 0.7),
        ("linear", 1e-2, 0): None,
    }
    result = run("linear", grid=("learning_rate=1e-2,1e-3,1e-4", "schedule=linear,cosine,inverse_sqrt", "steps=8,16"))
    assert of(result, "linear").at_edge == ("learning_rate",)
    assert of(result, "full").at_edge == ()


def test_trials_are_trained_in_turns_and_kept(run: Sweep, trainer: Trainer) -> None:
    run("linear", seeds=(3, 4))
    expected = [(name, rate, seed) for seed in (3, 4) for rate in (1e-3, 1e-4) for name in ("full", "linear")]
    assert trainer.called == expected
    again = run("linear", seeds=(3, 4))
    assert trainer.called == expected
    assert [len(result.entry.runs) for tuned in again.tuned for result in tuned.results] == [2] * 4
    run("linear", seeds=(3, 4), force=True)
    assert trainer.called == 2 * expected


def test_an_interrupted_sweep_goes_on_where_it_was(run: Sweep, trainer: Trainer) -> None:
    trainer.stops_after = 3
    with pytest.raises(StoppedError):
        run("linear")
    trainer.stops_after = 1000
    run("linear")
    assert [(name, rate) for name, rate, _ in trainer.called] == [
        ("full", 1e-3),
        ("linear", 1e-3),
        ("full", 1e-4),
        ("linear", 1e-4),
    ]


def test_a_larger_grid_takes_over_the_trials_of_a_smaller_one(run: Sweep, trainer: Trainer) -> None:
    run("linear")
    trainer.called.clear()
    result = run("linear", grid=("learning_rate=1e-3,1e-4,1e-5",))
    assert trainer.called == [("full", 1e-5, 0), ("linear", 1e-5, 0)]
    assert len(of(result, "linear").results) == 3


def test_no_table_of_the_report_mixes_trials(run: Sweep, request_of: Callable[..., Request]) -> None:
    run("linear", grid=("learning_rate=5e-3,1e-3",))  # the first of them is the preset's own
    found = comparisons(read_all(request_of().output))
    assert {c.preset: [entry.label for entry in c.entries] for c in found} == {
        request_of().preset.name: ["full", "linear"],
        "tiny:learning_rate=0.001": ["full", "linear"],
    }
    assert len(found) == 2
    assert all(c.guess is not None for c in found)


def test_options_and_settings_of_one_mechanism_are_trials_as_well(
    run: Sweep, trainer: Trainer, request_of: Callable[..., Request], tiny_data: ClassificationData
) -> None:
    grid = ("local.window=5,9", "full.learning_rate=1e-3,1e-4")
    trainer.scores = {("full", 1e-4, 0): (0.6, 0.6)}
    result = run("local", grid=grid)
    assert [entry.label for entry in result.comparison.entries] == ["full learning_rate=0.0001", "local window=5"]
    request = request_of("local")
    planned = plan_sweep(request, make_trials(read_axes(grid), request.mixers, request.preset), tiny_data)
    assert [run.plan.mixer.text for run in planned] == ["full", "local:window=5", "full", "local:window=9"]
    assert all(run.done for run in planned)


def test_the_choice_is_kept_with_what_it_was_made_from(
    run: Sweep, trainer: Trainer, request_of: Callable[..., Request]
) -> None:
    grid = ("learning_rate=1e-2,1e-3,1e-4",)
    trainer.scores = {("linear", 1e-2, 0): None, ("linear", 1e-4, 0): (0.7, 0.6)}
    result = run("linear", grid=grid)
    record = sweep_record(result, request_of("linear"), grid)
    full, linear = record.mechanisms
    assert (full.mechanism, full.chosen, linear.mechanism, linear.chosen) == ("full", 0, "linear", 2)
    assert [trial.varied for trial in linear.trials] == [{"learning_rate": rate} for rate in (1e-2, 1e-3, 1e-4)]
    assert [trial.validation for trial in linear.trials] == [None, 0.5, 0.7]
    assert linear.trials[0].reason == "diverged: the loss is not finite"
    assert (linear.test, linear.at_edge) == (0.6, ("learning_rate",))
    assert record.command.endswith("--grid learning_rate=1e-2,1e-3,1e-4 --seeds 1 --seed 0")
    assert record.recommendation == recommend(result.comparison).sentences
