"""Figures formed from records: means with errors over seeds, time and memory at a length, the Pareto front.

Nothing is extrapolated: a length outside the measured ones has no figures.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from subquad.records.schema import ProfilePoint, ProfileRecord


@dataclass(frozen=True)
class Summary:
    """Test scores of one set-up, one a seed, all measured on the same test examples.

    Attributes:
        values: of the metric.
        errors: the standard error of each value that the size of the test split causes.
    """

    values: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def sampling_error(self) -> float:
        """The standard error that the size of the test split alone causes; more seeds don't shrink it."""
        return math.sqrt(statistics.fmean(error**2 for error in self.errors))

    @property
    def standard_error(self) -> float:
        """The standard error of the mean over the seeds; the sampling error where a single seed was run."""
        if len(self.values) == 1:
            return self.sampling_error
        return statistics.stdev(self.values) / math.sqrt(len(self.values))

    @property
    def cautious_error(self) -> float:
        """The larger of both errors: two seeds that agree by chance must not make a tie look like a win."""
        return max(self.standard_error, self.sampling_error)


@dataclass(frozen=True)
class Speed:
    """Time and memory of a mixer and of dense fused attention at one length, read from a profile.

    Between two measured lengths every figure is interpolated log-log. Bytes are for the profile's batch.
    """

    seconds: float
    dense_seconds: float
    saved_bytes: float
    dense_saved_bytes: float

    @property
    def relative(self) -> float:
        """How many times faster than dense fused attention; below 1: slower."""
        return self.dense_seconds / self.seconds


def speed_at(profile: ProfileRecord, length: float) -> Speed | None:
    """Return the figures of `profile` at `length` tokens, None outside the measured lengths."""
    lower = max((point for point in profile.points if point.length <= length), key=lambda p: p.length, default=None)
    upper = min((point for point in profile.points if point.length >= length), key=lambda p: p.length, default=None)
    if lower is None or upper is None:
        return None
    exact = lower.length == upper.length
    weight = 0.0 if exact else math.log(length / lower.length) / math.log(upper.length / lower.length)

    def between(figure: Callable[[ProfilePoint], float]) -> float:
        below, above = figure(lower), figure(upper)
        if exact or below <= 0 or above <= 0:
            return below + weight * (above - below)
        return below * (above / below) ** weight

    return Speed(
        seconds=between(lambda p: p.forward_backward.median_seconds),
        dense_seconds=between(lambda p: p.dense_forward_backward.median_seconds),
        saved_bytes=between(lambda p: p.saved_bytes),
        dense_saved_bytes=between(lambda p: p.dense_saved_bytes),
    )


def pareto_front(points: Sequence[tuple[float, ...]]) -> tuple[int, ...]:
    """Return the indices of the points that no other point beats; larger is better in every coordinate."""

    def dominated(point: tuple[float, ...]) -> bool:
        return any(other != point and all(o >= p for o, p in zip(other, point, strict=True)) for other in points)

    return tuple(index for index, point in enumerate(points) if not dominated(point))
