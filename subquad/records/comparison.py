"""What may stand in one table: comparable runs (`Comparison`), of which the seeds of one set-up are a row (`Entry`).

Runs are comparable when hardware, task with data hash, preset, budget and the size of the model are the same
(`Protocol`); no figure is ever formed across two comparisons.
"""

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from subquad.config import write_option
from subquad.records.conventions import DENSE
from subquad.records.measures import Speed, Summary, speed_at
from subquad.records.metrics import MetricKind
from subquad.records.schema import Budget, ProfileRecord, RunRecord, Status, TaskInfo
from subquad.records.scores import Metric, Score

PARAMETER_TOLERANCE = 0.10
QUICK_PRESET = "quick"


@dataclass(frozen=True, order=True)
class Protocol:
    """What must be equal for two runs to stand in one table; width and depth are None where the budget varies them."""

    hardware: str
    task: str
    data_hash: str
    preset: str
    budget_kind: str
    budget_amount: float
    width: str
    depth: str


def protocol_of(run: RunRecord) -> Protocol:
    """Return the protocol of a run. A parameter or FLOP budget sets width and depth free, the others fix them."""
    free = run.budget.kind in ("parameters", "flops")
    width, depth = ("", "") if free else (_field(run, "hidden_size"), _field(run, "num_hidden_layers"))
    task, budget = run.task, run.budget
    hardware = run.environment.hardware
    return Protocol(hardware, task.name, task.data_hash, run.preset, budget.kind, budget.amount, width, depth)


def preset_of(run: RunRecord) -> str:
    """Return the preset of a run as a user writes it: "quick", "quick:learning_rate=0.001"."""
    if not run.changed_settings:
        return run.preset
    changed = [write_option(name, value) for name, value in run.changed_settings.items()]
    return ":".join([run.preset.rpartition("-")[0], *changed])


def _field(run: RunRecord, name: str) -> str:
    return str(run.model.get(name, ""))


@dataclass(frozen=True)
class Entry:
    """One row: the seeds of one set-up, with its profile on the same hardware and the proofs that failed."""

    key: str
    mixer_key: str
    label: str
    runs: tuple[RunRecord, ...]
    profile: ProfileRecord | None
    red_probes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The mixer's name."""
        return self.runs[0].mixer_name

    @property
    def finished(self) -> tuple[RunRecord, ...]:
        """The runs that ended well."""
        return tuple(run for run in self.runs if run.status is Status.OK)

    @property
    def clean(self) -> bool:
        """Whether every seed ended well and no proof failed; nothing else may be recommended."""
        return not self.red_probes and len(self.finished) == len(self.runs)

    @property
    def reason(self) -> str:
        """What is wrong with the row, "" where nothing is."""
        if self.red_probes:
            return "red probe: " + "; ".join(self.red_probes)
        failed = [run for run in self.runs if run.status is not Status.OK]
        counts = Counter(f"{run.status.value}: {run.message}" for run in failed)
        if len(failed) == len(self.runs):
            return "; ".join(counts)
        return "; ".join(f"{count} of {len(self.runs)} seeds {text}" for text, count in counts.items())

    @property
    def status(self) -> str:
        """One word or two for the row: "ok", "red probe", a failed status, or how many of the seeds are ok."""
        if self.red_probes:
            return "red probe"
        if len(self.finished) == len(self.runs):
            return Status.OK.value
        if self.finished:
            return f"{len(self.finished)} of {len(self.runs)} ok"
        return Counter(run.status.value for run in self.runs).most_common(1)[0][0]

    @property
    def best(self) -> Summary | None:
        """Test score at the best-validation step; None without a finished run or with a red probe."""
        return self._summary(lambda metric: metric.best_validation)

    @property
    def last(self) -> Summary | None:
        """Test score at the last step, otherwise as `best`."""
        return self._summary(lambda metric: metric.last_step)

    def _summary(self, score: Callable[[Metric], Score]) -> Summary | None:
        scores = [score(run.metric) for run in self.finished if run.metric is not None]
        if self.red_probes or not scores:
            return None
        return Summary(tuple(s.test for s in scores), tuple(s.test_standard_error for s in scores))

    @property
    def speed(self) -> Speed | None:
        """Time and memory at the task's length; None where not measured or with a red probe."""
        if self.profile is None or self.red_probes:
            return None
        return speed_at(self.profile, self.runs[0].task.max_length)

    @property
    def validation(self) -> float | None:
        """The mean of the best validation scores over the seeds, for choosing among set-ups; None if not `clean`."""
        scores = [run.metric.best_validation.validation for run in self.finished if run.metric is not None]
        return statistics.fmean(scores) if self.clean and scores else None

    @property
    def carries_state(self) -> bool | None:
        """Whether the model took its state from window to window; None where the data were no stream, or unknown."""
        return next((run.carries_state for run in self.finished), None)

    @property
    def unequal_parameters(self) -> bool:
        """Whether the model's size is more than 10 % from that of the same model with dense attention."""
        run = self.runs[0]
        if run.parameters_of_dense is None:
            return False
        return abs(run.parameters - run.parameters_of_dense) > PARAMETER_TOLERANCE * run.parameters_of_dense


@dataclass(frozen=True)
class Comparison:
    """All comparable runs of a task: entries in order (dense, by score, failed last) and the guess without a model.

    `preset` is the preset as a user writes it, changed settings included.
    """

    protocol: Protocol
    preset: str
    task: TaskInfo
    budget: Budget
    entries: tuple[Entry, ...]
    guess: RunRecord | None

    @property
    def kind(self) -> MetricKind:
        """What is known of the metric: direction, unit, how it is written."""
        return self.task.kind

    @property
    def is_lra(self) -> bool:
        """Whether this is Long Range Arena: its data, and not the shortened protocol of the quick preset."""
        return self.task.is_lra and self.preset.partition(":")[0] != QUICK_PRESET

    @property
    def is_stream(self) -> bool:
        """Whether windows of documents were laid one behind the other, so that positions count through all of them."""
        return any(entry.carries_state is not None for entry in self.entries)

    @property
    def dense(self) -> Entry | None:
        """The row of dense attention."""
        return next((entry for entry in self.entries if entry.name == DENSE), None)

    @property
    def guess_label(self) -> str:
        """What the guess is called, such as "majority class"; "" where it isn't recorded."""
        return self.guess.mixer_name.replace("_", " ") if self.guess else ""

    @property
    def guess_score(self) -> float | None:
        """Test score of the guess."""
        metric = self.guess.metric if self.guess else None
        return metric.best_validation.test if metric else None
