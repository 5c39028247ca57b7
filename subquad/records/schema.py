"""The records of a comparison: one training run, one speed profile, and everything needed to believe and repeat them.

A record is one JSON document with a version. JSON has no NaN: a training loss that is not finite is kept as null, every
other figure must be finite.

This module knows nothing of folders (`store`) and draws no conclusion from several records (`queries`).
"""

import math
import statistics
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from subquad.records.strict import Accuracy, Count, FiniteOrNone, PathPart, Sample, Seconds, Strict

SCHEMA_VERSION = 1
MAX_SAMPLES = 200
DENSE = "full"
MAJORITY = "majority_class"


def binomial_error(accuracy: float, examples: int) -> float:
    """Return sqrt(p (1 - p) / n), the standard error of an accuracy p measured on n examples."""
    return math.sqrt(accuracy * (1 - accuracy) / examples)


def utc_now() -> str:
    """Return the present moment as `created` expects it: ISO 8601, to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Status(StrEnum):
    """How a run or a profile ended."""

    OK = "ok"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out of memory"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"


class Environment(Strict):
    """The machine and the software of a measurement; `hardware` names the machine's folder, as "amd-epyc-2-threads"."""

    hardware: PathPart
    cpu: str
    accelerator: str | None
    threads: Annotated[int, Field(ge=1)]
    memory_bytes: Count
    operating_system: str
    python: str
    torch: str
    transformers: str
    subquad: str
    commit: str | None


class TaskInfo(Strict):
    """A task as data: its name, the hash of its data, the sizes of its splits, and whether it is Long Range Arena."""

    name: PathPart
    title: str
    is_lra: bool
    data_hash: PathPart
    train_size: Count
    validation_size: Count
    test_size: Count
    num_labels: Annotated[int, Field(ge=1)]
    max_length: Annotated[int, Field(ge=1)]


class Budget(Strict):
    """What every mechanism was given alike: steps, parameters, FLOPs or seconds of training time."""

    kind: Literal["steps", "parameters", "flops", "time"]
    amount: Annotated[float, Field(gt=0)]


class Score(Strict):
    """Accuracy in 0..1 on the validation and test splits after `step` steps."""

    step: Count
    validation: Accuracy
    test: Accuracy


class Metric(Strict):
    """The result of a run: the score at the step with the best validation accuracy and the score at the last step."""

    name: str
    higher_is_better: bool
    examples: Annotated[int, Field(ge=1)]
    best_validation: Score
    last_step: Score

    @property
    def best_validation_standard_error(self) -> float:
        """Binomial standard error of the test accuracy at the best-validation step."""
        return binomial_error(self.best_validation.test, self.examples)

    @property
    def last_step_standard_error(self) -> float:
        """Binomial standard error of the test accuracy at the last step."""
        return binomial_error(self.last_step.test, self.examples)


class CurvePoint(Strict):
    """One point of a learning curve; `train_loss` is None where it was not finite, `validation` where not measured."""

    step: Count
    train_loss: FiniteOrNone
    validation: Accuracy | None = None


class CostRecord(Strict):
    """The analytic cost of one sequence: forward FLOPs, bytes autograd keeps, bytes of state, number of parameters."""

    flops: Count
    activation_bytes: Count
    state_bytes: Count
    parameters: Count


class ReceiptRecord(Strict):
    """Something else ran than was asked for: where, what was asked, what ran instead, why, how often."""

    where: str
    asked: str
    ran: str
    reason: str
    count: Annotated[int, Field(ge=1)]


class ProbeRecord(Strict):
    """One proof of a mechanism (leak, padding, prefix ...): its outcome, what it saw, how long it took."""

    name: str
    passed: bool
    detail: str
    seconds: Seconds


class Record(Strict):
    """What runs and profiles have in common: when, where, by which command, of which mixer, and how it ended."""

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    command: str
    mixer: dict[str, JsonValue]
    receipts: tuple[ReceiptRecord, ...] = ()
    environment: Environment
    status: Status
    message: str = ""

    @field_validator("created")
    @classmethod
    def _check_created(cls, created: str) -> str:
        moment = datetime.fromisoformat(created)
        if moment.utcoffset() != timedelta(0):
            raise ValueError(f"expected a moment in UTC such as {utc_now()}, got {created!r}")
        return created

    @field_validator("mixer")
    @classmethod
    def _check_mixer(cls, mixer: dict[str, JsonValue]) -> dict[str, JsonValue]:
        name = mixer.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError('expected the mixer as a dict with its "name" first, such as {"name": "local"}')
        return {"name": name, **{key: mixer[key] for key in mixer if key != "name"}}

    @property
    def mixer_name(self) -> str:
        """The name of the mixer; `full` is dense attention, `majority_class` the guess without a model."""
        return str(self.mixer["name"])

    @model_validator(mode="after")
    def _check_message(self) -> Self:
        if self.status is not Status.OK and not self.message.strip():
            raise ValueError(f"status {self.status.value!r} needs a message that says what happened")
        return self


class RunRecord(Record):
    """One training run. The majority-class guess is one too: mixer {"name": "majority_class"}, 0 parameters, 0 steps.

    `parameters_of_dense` is the size of the same model with dense attention; `saved_bytes` is what autograd keeps for
    one training step and `peak_bytes` the peak memory, both None where not measured. A run that failed has no metric.
    """

    task: TaskInfo
    placement: Literal["sublayer", "block", "none"]
    model: dict[str, JsonValue]
    parameters: Count
    parameters_of_dense: Count | None
    preset: PathPart
    steps: Count
    budget: Budget
    seed: Count
    metric: Metric | None
    curve: tuple[CurvePoint, ...] = ()
    train_seconds: Seconds
    cost: CostRecord | None = None
    saved_bytes: Count | None = None
    peak_bytes: Count | None = None
    probes: tuple[ProbeRecord, ...] = ()

    @model_validator(mode="after")
    def _check_metric(self) -> Self:
        if self.status is Status.OK and self.metric is None:
            raise ValueError("a run with status 'ok' needs a metric")
        return self


class Timing(Strict):
    """Wall-clock seconds of repeated measurements, at most 200 of them."""

    samples_seconds: Annotated[tuple[Sample, ...], Field(min_length=1, max_length=MAX_SAMPLES)]

    @property
    def median_seconds(self) -> float:
        """The median of the samples."""
        return statistics.median(self.samples_seconds)

    @property
    def quartiles_seconds(self) -> tuple[float, float]:
        """The first and third quartile of the samples."""
        if len(self.samples_seconds) == 1:
            return self.samples_seconds[0], self.samples_seconds[0]
        first, _, third = statistics.quantiles(self.samples_seconds, n=4, method="inclusive")
        return first, third

    @property
    def interquartile_seconds(self) -> float:
        """The distance between the quartiles; 0 for a single sample."""
        return self.quartiles_seconds[1] - self.quartiles_seconds[0]


class ProfilePoint(Strict):
    """A mechanism and dense fused attention, measured alternately at one length in tokens; bytes are for the batch."""

    length: Annotated[int, Field(ge=1)]
    forward: Timing
    forward_backward: Timing
    dense_forward: Timing
    dense_forward_backward: Timing
    saved_bytes: Count
    dense_saved_bytes: Count
    peak_bytes: Count | None
    dense_peak_bytes: Count | None
    cost: CostRecord
    dense_cost: CostRecord


class ProfileRecord(Record):
    """Time and memory of one mixer against length on one machine, points in order of length."""

    embed_dim: Annotated[int, Field(ge=1)]
    num_heads: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    dtype: str
    causal: bool
    points: tuple[ProfilePoint, ...] = ()

    @model_validator(mode="after")
    def _check_points(self) -> Self:
        lengths = [point.length for point in self.points]
        if lengths != sorted(set(lengths)):
            raise ValueError(f"expected points of increasing length, got the lengths {lengths}")
        if self.status is Status.OK and not lengths:
            raise ValueError("a profile with status 'ok' needs at least one point")
        return self

    @property
    def crossover_length(self) -> float | None:
        """The shortest length in tokens from which forward + backward stays faster than dense attention.

        Medians are compared and interpolated log-log between the measured lengths. The shortest measured length where
        the mechanism is faster everywhere; None where it is not faster at the longest one.
        """
        faster: tuple[float, float] | None = None
        for point in reversed(self.points):
            advantage = math.log(point.dense_forward_backward.median_seconds / point.forward_backward.median_seconds)
            here = math.log(point.length)
            if advantage <= 0:
                if faster is None:
                    return None
                there, gain = faster
                return math.exp(here + (there - here) * -advantage / (gain - advantage))
            faster = (here, advantage)
        return float(self.points[0].length) if self.points else None
