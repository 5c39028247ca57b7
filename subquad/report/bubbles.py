"""The figure every paper on this subject draws, as data: accuracy against speed, the area being memory.

The page (plotly) and the picture for the README (matplotlib) draw the same `BubbleChart`, so they can't disagree. Only
entries with an accuracy and a measured speed are points; the others are named in `missing` with the reason.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from subquad.records import units
from subquad.records.measures import Speed, Summary, pareto_front
from subquad.records.queries import Comparison, Entry
from subquad.report.labels import Bubble, place
from subquad.report.tables import front_of

LARGEST_DIAMETER = 64.0
SMALLEST_DIAMETER = 9.0
WIDTH, HEIGHT = 860.0, 400.0


@dataclass(frozen=True)
class Point:
    """One bubble: accuracies in 0..1, diameter and label offset in pixels."""

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
    """The points with the ranges of both axes, the majority accuracy, and the front of accuracy against speed."""

    length: int
    points: tuple[Point, ...]
    speed_range: tuple[float, float]
    accuracy_range: tuple[float, float]
    majority: float | None
    front: tuple[tuple[float, float], ...]
    missing: tuple[tuple[Entry, str], ...]


def bubble_chart(comparison: Comparison) -> BubbleChart:
    """Return the chart of a comparison; `points` is empty where no entry has both an accuracy and a speed."""
    found = [(entry, entry.best, entry.speed) for entry in comparison.entries]
    measured = [(entry, best, speed) for entry, best, speed in found if best is not None and speed is not None]
    missing = tuple((e, _why_missing(e, comparison)) for e, best, speed in found if best is None or speed is None)
    speeds = [speed.relative for _, _, speed in measured]
    accuracies = [a for _, best, _ in measured for a in _interval(best)]
    majority = comparison.majority_accuracy
    if majority is not None:
        accuracies.append(majority)
    speed_range, accuracy_range = _speed_range(speeds), _accuracy_range(accuracies)
    points = _points(measured, front_of(comparison), speed_range, accuracy_range)
    return BubbleChart(
        length=comparison.task.max_length,
        points=points,
        speed_range=speed_range,
        accuracy_range=accuracy_range,
        majority=majority,
        front=_front_line([(p.speed.relative, p.summary.mean) for p in points if p.entry.clean]),
        missing=missing,
    )


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


def _accuracy_range(accuracies: Sequence[float]) -> tuple[float, float]:
    if not accuracies:
        return 0.0, 1.0
    low, high = min(accuracies), max(accuracies)
    margin = max(0.14 * (high - low), 0.01)
    return low - margin, high + margin


def _points(
    measured: Sequence[tuple[Entry, Summary, Speed]],
    front: frozenset[str],
    speed_range: tuple[float, float],
    accuracy_range: tuple[float, float],
) -> tuple[Point, ...]:
    largest = max([1.0, *(speed.saved_bytes for _, _, speed in measured)])
    diameters = [max(LARGEST_DIAMETER * math.sqrt(s.saved_bytes / largest), SMALLEST_DIAMETER) for _, _, s in measured]
    scale = HEIGHT / (accuracy_range[1] - accuracy_range[0])

    def pixels(relative: float, accuracy: float) -> tuple[float, float]:
        x = WIDTH * math.log(relative / speed_range[0]) / math.log(speed_range[1] / speed_range[0])
        return x, scale * (accuracy - accuracy_range[0])

    bubbles = [
        Bubble(*pixels(s.relative, b.mean), d / 2, scale * b.standard_error, (e.label, units.size(s.saved_bytes)))
        for (e, b, s), d in zip(measured, diameters, strict=True)
    ]
    line = [pixels(*place) for place in _front_line([(s.relative, b.mean) for e, b, s in measured if e.clean])]
    offsets = place(bubbles, line, WIDTH, HEIGHT)
    return tuple(
        Point(entry, summary, speed, diameter, entry.key in front, offset)
        for (entry, summary, speed), diameter, offset in zip(measured, diameters, offsets, strict=True)
    )


def _front_line(places: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    return tuple(sorted(places[index] for index in pareto_front(places)))
