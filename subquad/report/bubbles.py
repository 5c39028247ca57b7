"""The figure every paper on this subject draws, as data: the score against speed, the area being memory.

The page (plotly) and the still picture (matplotlib) draw the same `BubbleChart`, so they can't disagree. Only
entries with a score and a measured speed are points; the others are named in `missing` with the reason.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from subquad.records import units
from subquad.records.comparison import Comparison, Entry
from subquad.records.measures import Speed, Summary, pareto_front
from subquad.records.metrics import MetricKind
from subquad.report.labels import Bubble, place
from subquad.report.tables import front_of

SMALLEST_DIAMETER = 9.0
FARTHEST_GUESS = 4.0
"""The guess is drawn where it is no farther from the scores than so many times their spread."""


@dataclass(frozen=True)
class Frame:
    """The area in pixels that a chart is laid out for, and the diameter of its largest bubble."""

    width: float
    height: float
    largest_diameter: float


WIDE = Frame(width=860.0, height=400.0, largest_diameter=64.0)
NARROW = Frame(width=250.0, height=366.0, largest_diameter=36.0)
"""A chart on a telephone."""


@dataclass(frozen=True)
class Point:
    """One bubble: score and error as recorded, diameter and label offset in pixels."""

    entry: Entry
    summary: Summary
    speed: Speed
    diameter: float
    on_front: bool
    label_offset: tuple[float, float]

    @property
    def lines(self) -> tuple[str, str]:
        """The label: the name, and below it the memory that the area stands for."""
        return self.entry.label, units.size(self.speed.saved_bytes)


@dataclass(frozen=True)
class BubbleChart:
    """The points with the ranges of both axes, the guess without a model, and the front of score against speed.

    `guess` is None where it isn't recorded or lies so far off that the mechanisms would stand in one line.
    Scores are as recorded; `kind` says how they are shown and which way is better.
    """

    kind: MetricKind
    length: int
    points: tuple[Point, ...]
    speed_range: tuple[float, float]
    score_range: tuple[float, float]
    guess: float | None
    guess_label: str
    front: tuple[tuple[float, float], ...]
    missing: tuple[tuple[Entry, str], ...]


def bubble_chart(comparison: Comparison, frame: Frame = WIDE) -> BubbleChart:
    """Return the chart of a comparison, labels placed for `frame`; no `points` where no entry has score and speed."""
    found = [(entry, entry.best, entry.speed) for entry in comparison.entries]
    measured = [(entry, best, speed) for entry, best, speed in found if best is not None and speed is not None]
    missing = tuple((e, _why_missing(e, comparison)) for e, best, speed in found if best is None or speed is None)
    speeds = [speed.relative for _, _, speed in measured]
    scores = [bound for _, best, _ in measured for bound in _interval(best)]
    guess = comparison.guess_score
    if guess is not None and _is_near(guess, scores):
        scores.append(guess)
    speed_range, score_range = _speed_range(speeds), _score_range(scores, 1 / comparison.kind.scale)
    front = _front_line([(s.relative, b.mean) for e, b, s in measured if e.clean], comparison.kind)
    points = _points(measured, front_of(comparison), front, (speed_range, score_range), frame)
    return BubbleChart(
        kind=comparison.kind,
        length=comparison.task.max_length,
        points=points,
        speed_range=speed_range,
        score_range=score_range,
        guess=guess if guess in scores else None,
        guess_label=comparison.guess_label,
        front=front,
        missing=missing,
    )


def _is_near(guess: float, scores: Sequence[float]) -> bool:
    """Whether the guess leaves enough of the chart to tell the mechanisms apart."""
    if not scores:
        return True
    low, high = min(scores), max(scores)
    return max(low - guess, guess - high) <= FARTHEST_GUESS * (high - low)


def _why_missing(entry: Entry, comparison: Comparison) -> str:
    if entry.best is None:
        return entry.reason
    if entry.profile is None:
        return "its speed was not profiled on this machine"
    return f"its profile has no lengths around {units.count(comparison.task.max_length)} tokens"


def _interval(summary: Summary) -> tuple[float, float]:
    return summary.mean - summary.standard_error, summary.mean + summary.standard_error


def _speed_range(speeds: Sequence[float]) -> tuple[float, float]:
    low, high = min([1.0, *speeds]), max([1.0, *speeds])
    margin = max((high / low) ** 0.16, 1.25)
    return low / margin, high * margin


def _score_range(scores: Sequence[float], least_margin: float) -> tuple[float, float]:
    if not scores:
        return 0.0, 1.0
    low, high = min(scores), max(scores)
    margin = max(0.14 * (high - low), least_margin)
    return low - margin, high + margin


def _points(
    measured: Sequence[tuple[Entry, Summary, Speed]],
    unbeaten: frozenset[str],
    front: Sequence[tuple[float, float]],
    ranges: tuple[tuple[float, float], tuple[float, float]],
    frame: Frame,
) -> tuple[Point, ...]:
    speed_range, score_range = ranges
    largest = max([1.0, *(speed.saved_bytes for _, _, speed in measured)])
    areas = [s.saved_bytes / largest for _, _, s in measured]
    diameters = [max(frame.largest_diameter * math.sqrt(area), SMALLEST_DIAMETER) for area in areas]
    scale = frame.height / (score_range[1] - score_range[0])

    def pixels(relative: float, score: float) -> tuple[float, float]:
        x = frame.width * math.log(relative / speed_range[0]) / math.log(speed_range[1] / speed_range[0])
        return x, scale * (score - score_range[0])

    bubbles = [
        Bubble(*pixels(s.relative, b.mean), d / 2, scale * b.standard_error, (e.label, units.size(s.saved_bytes)))
        for (e, b, s), d in zip(measured, diameters, strict=True)
    ]
    offsets = place(bubbles, [pixels(*corner) for corner in front], frame.width, frame.height)
    return tuple(
        Point(entry, summary, speed, diameter, entry.key in unbeaten, offset)
        for (entry, summary, speed), diameter, offset in zip(measured, diameters, offsets, strict=True)
    )


def _front_line(places: Sequence[tuple[float, float]], kind: MetricKind) -> tuple[tuple[float, float], ...]:
    front = pareto_front([(speed, kind.goodness(score)) for speed, score in places])
    return tuple(sorted(places[index] for index in front))
