"""The rows of a comparison as data, so that the terminal and the page show the same numbers from one place.

Figures are raw (accuracies in 0..1, seconds, bytes) and None where there is none; `cells` writes them for a reader.
A row without figures keeps its place and says why.
"""

from dataclasses import dataclass

from subquad.records import units
from subquad.records.measures import Summary, pareto_front
from subquad.records.queries import Comparison, Entry, comparisons
from subquad.records.schema import MAJORITY, Metric, RunRecord
from subquad.records.store import Records

COLUMNS = (
    ("mechanism", "Mechanism"),
    ("status", "Status"),
    ("best", "Test accuracy, best validation"),
    ("last", "Test accuracy, last step"),
    ("speed", "Speed vs dense"),
    ("step_time", "Forward + backward"),
    ("saved", "Kept for backward"),
    ("memory", "Training memory"),
    ("parameters", "Parameters"),
    ("steps", "Steps"),
    ("train_time", "Training time"),
)


@dataclass(frozen=True)
class Row:
    """One line of a comparison's table. `best` and `last` hold an accuracy a seed; errors are over the seeds.

    `relative_speed` (times dense fused attention), `step_seconds` (forward + backward of one batch of the mixer) and
    `saved_bytes` are the profile's, at the task's length; `kept_bytes` and `peak_bytes` are those of a training step of
    the whole model, the largest over the seeds. `train_seconds` is the mean over the seeds that ended well.
    """

    comparison: Comparison
    entry: Entry | None
    label: str
    best: Summary | None
    last: Summary | None
    relative_speed: float | None
    step_seconds: float | None
    saved_bytes: float | None
    kept_bytes: int | None
    peak_bytes: int | None
    parameters: int
    unequal_parameters: bool
    on_pareto_front: bool
    steps: int
    train_seconds: float | None
    status: str
    reason: str
    commands: tuple[str, ...]

    @property
    def has_figures(self) -> bool:
        """Whether the row has an accuracy; a failed or red one has none."""
        return self.best is not None


def comparison_rows(records: Records) -> list[Row]:
    """Return the rows of every comparison in `records`, in order; dense attention first, the majority guess last."""
    return [row for comparison in comparisons(records) for row in rows_of(comparison)]


def rows_of(comparison: Comparison) -> list[Row]:
    """Return the rows of one comparison; its majority-class guess, where recorded, is the last."""
    front = front_of(comparison)
    rows = [_row(comparison, entry, entry.key in front) for entry in comparison.entries]
    if comparison.majority is not None:
        rows.append(_majority_row(comparison, comparison.majority))
    return rows


def front_of(comparison: Comparison) -> frozenset[str]:
    """Return the keys of the clean entries that none beats in accuracy, speed and memory at once."""
    measured = [(e.key, e.best, e.speed) for e in comparison.entries if e.clean]
    points = [(key, (b.mean, s.relative, -s.saved_bytes)) for key, b, s in measured if b is not None and s is not None]
    return frozenset(points[index][0] for index in pareto_front([point for _, point in points]))


def _row(comparison: Comparison, entry: Entry, on_front: bool) -> Row:
    speed = entry.speed if entry.best is not None else None
    finished = entry.finished if entry.best is not None else ()
    return Row(
        comparison=comparison,
        entry=entry,
        label=entry.label,
        best=entry.best,
        last=entry.last,
        relative_speed=speed.relative if speed else None,
        step_seconds=speed.seconds if speed else None,
        saved_bytes=speed.saved_bytes if speed else None,
        kept_bytes=max((run.saved_bytes for run in finished if run.saved_bytes is not None), default=None),
        peak_bytes=max((run.peak_bytes for run in finished if run.peak_bytes is not None), default=None),
        parameters=entry.runs[0].parameters,
        unequal_parameters=entry.unequal_parameters,
        on_pareto_front=on_front,
        steps=max(run.steps for run in entry.runs),
        train_seconds=sum(run.train_seconds for run in finished) / len(finished) if finished else None,
        status=entry.status,
        reason=entry.reason,
        commands=tuple(run.command for run in entry.runs),
    )


def _majority_row(comparison: Comparison, run: RunRecord) -> Row:
    return Row(
        comparison=comparison,
        entry=None,
        label=MAJORITY.replace("_", " "),
        best=_single(run.metric.best_validation.test, run.metric) if run.metric else None,
        last=_single(run.metric.last_step.test, run.metric) if run.metric else None,
        relative_speed=None,
        step_seconds=None,
        saved_bytes=None,
        kept_bytes=None,
        peak_bytes=None,
        parameters=run.parameters,
        unequal_parameters=False,
        on_pareto_front=False,
        steps=run.steps,
        train_seconds=None,
        status=run.status.value,
        reason=run.message,
        commands=(run.command,),
    )


def _single(accuracy: float, metric: Metric) -> Summary:
    return Summary((accuracy,), metric.examples)


def cells(row: Row) -> dict[str, str]:
    """Return the row's text for each column of `COLUMNS`, "–" where there is no figure.

    Training memory is the peak; where that was not measured, "≥" and what autograd keeps.
    """
    return {
        "mechanism": row.label,
        "best": _accuracy(row.best),
        "last": _accuracy(row.last),
        "speed": "–" if row.relative_speed is None else units.times(row.relative_speed),
        "step_time": "–" if row.step_seconds is None else units.seconds(row.step_seconds),
        "saved": "–" if row.saved_bytes is None else units.size(row.saved_bytes),
        "memory": _training_memory(row),
        "parameters": units.count(row.parameters) + (" *" if row.unequal_parameters else ""),
        "steps": units.count(row.steps),
        "train_time": "–" if row.train_seconds is None else units.seconds(row.train_seconds),
        "status": row.status,
    }


def _accuracy(summary: Summary | None) -> str:
    return "–" if summary is None else units.percent_with_error(summary.mean, summary.standard_error)


def _training_memory(row: Row) -> str:
    if row.peak_bytes is not None:
        return units.size(row.peak_bytes)
    return "–" if row.kept_bytes is None else f"≥ {units.size(row.kept_bytes)}"
