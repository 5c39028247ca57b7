"""The rows of a comparison as data, so that the terminal and the page show the same numbers from one place.

Figures are raw (scores as recorded, seconds, bytes) and None where there is none; `cells` writes them for a reader.
A row without figures keeps its place and says why.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from subquad.records import units
from subquad.records.comparison import Comparison, Entry
from subquad.records.measures import Summary, pareto_front
from subquad.records.metrics import MetricKind
from subquad.records.schema import RunRecord
from subquad.records.scores import Score

COLUMNS = (
    ("mechanism", "Mechanism"),
    ("status", "Status"),
    ("best", "Test {metric}, best validation"),
    ("last", "Test {metric}, last step"),
    ("speed", "Speed vs dense"),
    ("step_time", "Forward + backward"),
    ("saved", "Kept for backward"),
    ("memory", "Training memory"),
    ("parameters", "Parameters"),
    ("steps", "Steps"),
    ("train_time", "Training time"),
)
"""Names and titles of the columns; {metric} stands for what the task is measured by."""


def column_titles(kind: MetricKind, columns: Sequence[tuple[str, str]] = COLUMNS) -> dict[str, str]:
    """The columns' titles by name, for one metric."""
    return {name: title.format(metric=kind.title) for name, title in columns}


@dataclass(frozen=True)
class Row:
    """One line of a comparison's table. `best` and `last` hold a score a seed; errors are over the seeds.

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
        """Whether the row has a score; a failed or red one has none."""
        return self.best is not None


def rows_of(comparison: Comparison) -> list[Row]:
    """Return the rows of one comparison; the guess without a model, where recorded, is the last."""
    front = front_of(comparison)
    rows = [_row(comparison, entry, entry.key in front) for entry in comparison.entries]
    if comparison.guess is not None:
        rows.append(_guess_row(comparison, comparison.guess))
    return rows


def stream_note(comparison: Comparison) -> str:
    """Who took its state from window to window of a stream, in a sentence; "" where the data were none."""
    entries = [entry for entry in comparison.entries if entry.best and entry.carries_state is not None]
    if not entries:
        return ""
    carrying = ", ".join(entry.label for entry in entries if entry.carries_state) or "none"
    alone = ", ".join(entry.label for entry in entries if not entry.carries_state) or "none"
    return f"Windows of a stream: carrying state from one to the next: {carrying}; seeing each alone: {alone}."


def front_of(comparison: Comparison) -> frozenset[str]:
    """Return the keys of the clean entries that none beats in score, speed and memory at once."""
    goodness = comparison.kind.goodness
    measured = [(e.key, e.best, e.speed) for e in comparison.entries if e.clean]
    found = [(key, best, speed) for key, best, speed in measured if best is not None and speed is not None]
    points = [(key, (goodness(best.mean), speed.relative, -speed.saved_bytes)) for key, best, speed in found]
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


def _guess_row(comparison: Comparison, run: RunRecord) -> Row:
    return Row(
        comparison=comparison,
        entry=None,
        label=comparison.guess_label,
        best=_single(run.metric.best_validation) if run.metric else None,
        last=_single(run.metric.last_step) if run.metric else None,
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


def _single(score: Score) -> Summary:
    return Summary((score.test,), (score.test_standard_error,))


def cells(row: Row) -> dict[str, str]:
    """Return the row's text for each column of `COLUMNS`, "–" where there is no figure.

    Training memory is the peak; where that was not measured, "≥" and what autograd keeps.
    """
    kind = row.comparison.kind
    return {
        "mechanism": row.label,
        "best": _score(row.best, kind),
        "last": _score(row.last, kind),
        "speed": "–" if row.relative_speed is None else units.times(row.relative_speed),
        "step_time": "–" if row.step_seconds is None else units.seconds(row.step_seconds),
        "saved": "–" if row.saved_bytes is None else units.size(row.saved_bytes),
        "memory": _training_memory(row),
        "parameters": units.count(row.parameters) + (" *" if row.unequal_parameters else ""),
        "steps": units.count(row.steps),
        "train_time": "–" if row.train_seconds is None else units.seconds(row.train_seconds),
        "status": row.status,
    }


def _score(summary: Summary | None, kind: MetricKind) -> str:
    return "–" if summary is None else kind.cell(summary.mean, summary.standard_error)


def _training_memory(row: Row) -> str:
    if row.peak_bytes is not None:
        return units.size(row.peak_bytes)
    return "–" if row.kept_bytes is None else f"≥ {units.size(row.kept_bytes)}"
