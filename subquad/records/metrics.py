"""The metrics of the tasks: what each is called, which way is better, and how a value with its error is written.

    accuracy               right answers / questions            61.3 ± 0.5 %                higher is better
    bits_per_byte          nats / (ln 2 x bytes asked for)      1.842 ± 0.011 bits/byte     lower is better
    bits_per_dimension     the same over pixels or samples      3.104 ± 0.008 bits/dim      lower is better

Every metric is a ratio of two sums over test examples, and so is its standard error (`estimate`). What holds for one
metric and not for another stands here; nothing else asks for a metric's name.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, NamedTuple


class Estimate(NamedTuple):
    """A value measured on a sample of examples, with its standard error."""

    value: float
    standard_error: float


def estimate(totals: Sequence[float], asked: Sequence[int]) -> Estimate:
    """The ratio r = sum(totals) / sum(asked) over examples, and its standard error.

    The error is that of a ratio of sums over independent examples, sqrt(sum (total - r asked)^2) / sum(asked):
    questions inside one example may depend on each other as they like (Cochran, Sampling Techniques, 1977, 6.3). Where
    each example asks one question with the answer right or wrong, it is the binomial sqrt(r (1 - r) / n).

    Args:
        totals: of each example, the sum over its questions.
        asked: of each example, the number of its questions; examples without any don't count.

    Raises:
        ValueError: nothing was asked.
    """
    questions = sum(asked)
    if not questions:
        raise ValueError("there is nothing to measure: no example asks for anything")
    ratio = math.fsum(totals) / questions
    squares = math.fsum((total - ratio * count) ** 2 for total, count in zip(totals, asked, strict=True))
    return Estimate(ratio, math.sqrt(squares) / questions)


@dataclass(frozen=True)
class MetricKind(ABC):
    """What is known of a metric, whatever was measured.

    Attributes:
        name: as tasks and records call it.
        title: as a reader calls it, in the middle of a sentence.
    """

    higher_is_better: ClassVar[bool]
    scale: ClassVar[float]
    """From a value as recorded to the number that is shown."""
    largest: ClassVar[float]
    """No value is larger."""

    name: str
    title: str

    @property
    @abstractmethod
    def unit(self) -> str:
        """What stands behind a number."""

    @abstractmethod
    def number(self, value: float) -> str:
        """The shown number of a value, without its unit, with as many digits as a test split can resolve."""

    @abstractmethod
    def difference(self, value: float) -> str:
        """A difference of two values, in words."""

    def write(self, value: float, error: float | None = None) -> str:
        """A value, with its standard error where there is one: "61.3 ± 0.5 %"."""
        return f"{self._with_error(value, error)} {self.unit}"

    @abstractmethod
    def cell(self, value: float, error: float | None = None) -> str:
        """The same in a column whose heading is the metric's title."""

    @abstractmethod
    def label(self, split: str) -> str:
        """Title of an axis, with the unit: "Test accuracy (%)"."""

    @abstractmethod
    def on_test(self, value: float, error: float) -> str:
        """A test score inside a sentence: "61.3 ± 0.5 % test accuracy"."""

    def goodness(self, value: float) -> float:
        """The value as a number that is larger where the value is better."""
        return value if self.higher_is_better else -value

    @property
    def direction(self) -> str:
        """Which way is better."""
        return "higher is better" if self.higher_is_better else "lower is better"

    @property
    def towards_better(self) -> str:
        """Where the better values lie in a chart."""
        return "Up" if self.higher_is_better else "Down"

    def _with_error(self, value: float, error: float | None) -> str:
        return self.number(value) if error is None else f"{self.number(value)} ± {self.number(error)}"

    def check(self, value: float) -> None:
        """Refuse what can't be a value of this metric.

        Raises:
            ValueError: naming metric, range and value.
        """
        if not 0 <= value <= self.largest:
            upper = f"at most {self.largest:g}" if math.isfinite(self.largest) else "finite"
            raise ValueError(f"{self.name} must be at least 0 and {upper}, got {value}")


@dataclass(frozen=True)
class Share(MetricKind):
    """A share of right answers, recorded in 0..1 and shown in per cent."""

    higher_is_better = True
    scale = 100.0
    largest = 1.0

    @property
    def unit(self) -> str:
        """Per cent."""
        return "%"

    def number(self, value: float) -> str:
        """One digit behind the point."""
        return f"{self.scale * value:.1f}"

    def difference(self, value: float) -> str:
        """In points of per cent."""
        return f"{self.number(value)} points"

    def cell(self, value: float, error: float | None = None) -> str:
        """As "61.3 ± 0.5 %": the title says nothing of per cent."""
        return self.write(value, error)

    def label(self, split: str) -> str:
        """As "Test accuracy (%)"."""
        return f"{split} {self.title} ({self.unit})"

    def on_test(self, value: float, error: float) -> str:
        """As "61.3 ± 0.5 % test accuracy"."""
        return f"{self.write(value, error)} test {self.title}"


@dataclass(frozen=True)
class Bits(MetricKind):
    """Bits that a model spends on what it has to predict.

    Attributes:
        per: what one bit count is for, as the unit abbreviates it.
    """

    higher_is_better = False
    scale = 1.0
    largest = math.inf

    per: str

    @property
    def unit(self) -> str:
        """Bits for one of what is predicted."""
        return f"bits/{self.per}"

    def number(self, value: float) -> str:
        """Three digits behind the point."""
        return f"{self.scale * value:.3f}"

    def difference(self, value: float) -> str:
        """In bits."""
        return f"{self.number(value)} {self.unit}"

    def cell(self, value: float, error: float | None = None) -> str:
        """As "1.842 ± 0.011": the title is the unit."""
        return self._with_error(value, error)

    def label(self, split: str) -> str:
        """As "Test bits per byte"."""
        return f"{split} {self.title}"

    def on_test(self, value: float, error: float) -> str:
        """As "1.842 ± 0.011 bits/byte on test"."""
        return f"{self.write(value, error)} on test"


METRICS: Mapping[str, MetricKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            Share("accuracy", "accuracy"),
            Bits("bits_per_byte", "bits per byte", "byte"),
            Bits("bits_per_dimension", "bits per dimension", "dim"),
        )
    }
)
"""Every metric by its name."""


def metric_kind(name: str) -> MetricKind:
    """The metric called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; known: {', '.join(METRICS)}")
    return METRICS[name]
