"""A sweep: the trials of a grid, trained and written down like any runs, and the best of every mechanism.

The best trial is the one with the best mean validation score over the seeds, of those whose every seed ended well; the
test score is looked up for that one and chooses nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from subquad.benchmark.grid import Trial
from subquad.benchmark.observer import Observer
from subquad.benchmark.recommendation import recommend
from subquad.benchmark.request import Request
from subquad.benchmark.runs import PlannedRun, plan_runs, train
from subquad.records.comparison import Comparison, Entry, protocol_of
from subquad.records.conventions import DENSE
from subquad.records.metrics import MetricKind
from subquad.records.queries import entries_of, guess_of
from subquad.records.schema import RunRecord, utc_now
from subquad.records.store import Records, read_all, read_run
from subquad.records.sweeps import SweepRecord, TrialRecord, TunedRecord
from subquad.tasks.base import TaskData


@dataclass(frozen=True)
class TrialResult:
    """A trial and the row that its seeds make."""

    trial: Trial
    entry: Entry


@dataclass(frozen=True)
class Tuned:
    """A mechanism with all its trials, in their order.

    Attributes:
        mechanism: its registered name.
        results: one for each of its trials.
        kind: what is known of the metric.
    """

    mechanism: str
    results: tuple[TrialResult, ...]
    kind: MetricKind

    @property
    def best(self) -> TrialResult | None:
        """The result with the best validation score, the earliest of equals; None where no trial ended well."""
        return max(
            (result for result in self.results if result.entry.validation is not None), key=self._goodness, default=None
        )

    @property
    def failed(self) -> tuple[TrialResult, ...]:
        """The trials of which a seed did not end well."""
        return tuple(result for result in self.results if result.entry.validation is None)

    @property
    def at_edge(self) -> tuple[str, ...]:
        """Names of numbers of which the best trial has the smallest or the largest of at least three values tried."""
        if self.best is None:
            return ()
        found, trials = self.best.trial, [result.trial for result in self.results]
        settings = _at_edge(found.settings, [trial.settings for trial in trials])
        return settings + _at_edge(found.options, [trial.options for trial in trials])

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """Smaller stands before: dense attention, then the others by validation score, then those without one."""
        best = self.best
        return self.results[0].entry.name != DENSE, best is None, 0.0 if best is None else -self._goodness(best)

    def _goodness(self, result: TrialResult) -> float:
        assert result.entry.validation is not None
        return self.kind.goodness(result.entry.validation)


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        tuned: the mechanisms, by rank.
        comparison: the best trial of each mechanism that has one, as rows of one table; each has chosen among equally
            many. It is what a recommendation is drawn from.
    """

    tuned: tuple[Tuned, ...]
    comparison: Comparison


def plan_sweep(request: Request, trials: Sequence[Trial], data: TaskData[Any]) -> list[PlannedRun]:
    """The runs of a sweep, seed by seed, and of each seed trial by trial. Raises as `plan_runs`."""
    return plan_runs(request, [trial.set_up for trial in trials], data)


def sweep(request: Request, trials: Sequence[Trial], data: TaskData[Any], observer: Observer) -> SweepResult:
    """Make every record that isn't there yet, and find the best trials. Raises as `prove_and_train`."""
    paths = train(request, plan_sweep(request, trials, data), data, observer)
    runs = [[read_run(path) for path in paths[index :: len(trials)]] for index in range(len(trials))]
    return _result(request, trials, runs, read_all(request.output))


def sweep_record(result: SweepResult, request: Request, grid: Sequence[str]) -> SweepRecord:
    """The choice of a sweep as it is kept; `grid` is what `--grid` said, each time that it was given."""
    comparison, recommendation = result.comparison, recommend(result.comparison)
    return SweepRecord(
        created=utc_now(),
        command=_command(request, grid),
        hardware=comparison.protocol.hardware,
        task=comparison.task,
        preset_name=request.preset.name,
        preset=request.preset.text,
        seeds=request.seeds,
        mechanisms=tuple(_tuned_record(tuned) for tuned in result.tuned),
        recommendation=tuple(recommendation.sentences),
        winner=None if recommendation.winner is None else recommendation.winner.label,
    )


def _tuned_record(tuned: Tuned) -> TunedRecord:
    best = tuned.best
    test = None if best is None else best.entry.best
    return TunedRecord(
        mechanism=tuned.mechanism,
        trials=tuple(_trial_record(result) for result in tuned.results),
        chosen=None if best is None else tuned.results.index(best),
        test=None if test is None else test.mean,
        test_standard_error=None if test is None else test.standard_error,
        at_edge=tuned.at_edge,
    )


def _trial_record(result: TrialResult) -> TrialRecord:
    entry, varied = result.entry, result.trial.settings | result.trial.options
    return TrialRecord(
        varied={name: list(value) if isinstance(value, tuple) else value for name, value in varied.items()},
        mixer=entry.runs[0].mixer,
        validation=entry.validation,
        status=entry.status,
        reason=entry.reason,
    )


def _command(request: Request, grid: Sequence[str]) -> str:
    """The command that makes the sweep again."""
    words = ["subquad", "sweep", "--task", request.preset.task, "--preset", request.preset.text]
    words += ["--mixers", ",".join(mixer.text for mixer in request.mixers)]
    words += [word for text in grid for word in ("--grid", text)]
    words += ["--seeds", str(len(request.seeds)), "--seed", str(request.seeds[0])]
    return shlex.join([*words, *([] if request.generated else ["--data", str(request.data)])])


def _result(
    request: Request, trials: Sequence[Trial], runs: Sequence[Sequence[RunRecord]], records: Records
) -> SweepResult:
    by_mechanism: dict[str, list[TrialResult]] = {trial.mechanism: [] for trial in trials}
    for trial, seeds in zip(trials, runs, strict=True):
        (entry,) = entries_of(seeds, records)
        label = f"{trial.mechanism} {trial.point_text}".strip()
        by_mechanism[trial.mechanism].append(TrialResult(trial, replace(entry, label=label)))
    first = runs[0][0]
    tuned = sorted(
        (Tuned(name, tuple(results), first.task.kind) for name, results in by_mechanism.items()),
        key=lambda each: each.rank,
    )
    comparison = Comparison(
        protocol=replace(protocol_of(first), preset=request.preset.name),
        preset=request.preset.text,
        task=first.task,
        budget=first.budget,
        entries=tuple(each.best.entry for each in tuned if each.best is not None),
        guess=guess_of(first.task, records),
    )
    return SweepResult(tuple(tuned), comparison)


def _at_edge(found: dict[str, Any], tried: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    names = []
    for name, value in found.items():
        values = {point[name] for point in tried}
        are_numbers = all(type(each) in (int, float) for each in values)
        if len(values) > 2 and are_numbers and value in (min(values), max(values)):
            names.append(name)
    return tuple(names)
