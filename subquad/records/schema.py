"""The records of a comparison: one training run, one speed profile, and everything needed to believe and repeat them.

A record is one JSON document with a version. What a run scored is in `scores`.

This module knows nothing of folders (`store`) and draws no conclusion from several records (`queries`).
"""

import math
import statistics
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from subquad.records.conventions import MAX_SAMPLES
from subquad.records.metrics import MetricKind, metric_kind
from subquad.records.scores import CurvePoint, Metric
from subquad.records.strict import Count, PathPart, Sample, Seconds, Strict

SCHEMA_VERSION = 1


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
    """A task as data: what is learned, how it is measured, the hash of its data, the sizes of its splits in examples.

    `num_labels` is the number of classes, None where the task has none. `is_lra` says whether it is Long Range Arena.
    """

    name: PathPart
    title: str
    is_lra: bool
    objective: PathPart
    metric: str
    data_hash: PathPart
    train_size: Count
    validation_size: Count
    test_size: Count
    vocab_size: Annotated[int, Field(ge=1)]
    num_labels: Annotated[int, Field(ge=1)] | None
    max_length: Annotated[int, Field(ge=1)]

    @property
    def kind(self) -> MetricKind:
        """What is known of the task's metric."""
        return metric_kind(self.metric)

    @field_validator("metric")
    @classmethod
    def _check_metric(cls, metric: str) -> str:
        return metric_kind(metric).name


class Budget(Strict):
    """What every mechanism was given alike: steps, parameters, FLOPs or seconds of training time."""

    kind: Literal["steps", "parameters", "flops", "time"]
    amount: Annotated[float, Field(gt=0)]


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
    """One proof of a mechanism (leak, padding, prefix ...): its outcome, what it saw, how long it took.

    `seconds` is None where it is not known, as of a proof that took its process down.
    """

    name: str
    passed: bool
    detail: str
    seconds: Seconds | None = None


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
        """The name of the mixer; `full` is dense attention; the guess without a model has a name here, too."""
        return str(self.mixer["name"])

    @model_validator(mode="after")
    def _check_message(self) -> Self:
        if self.status is not Status.OK and not self.message.strip():
            raise ValueError(f"status {self.status.value!r} needs a message that says what happened")
        return self


class RunRecord(Record):
    """One training run, or the guess without a model: placement "none", 0 steps, mixer {"name": "majority_class"}.

    `parameters_of_dense` is the size of the same model with dense attention; `saved_bytes` is what autograd keeps for
    one training step and `peak_bytes` the peak memory, both None where not measured. `carries_state` says whether the
    model took its state from one window of a stream to the next; None where the task was no stream. A run that failed
    has no metric. `changed_settings` are training settings in which the run differs from the preset as it is written;
    the name of such a preset ends with a hyphen and a hash of all of them.
    """

    task: TaskInfo
    placement: Literal["sublayer", "block", "none"]
    model: dict[str, JsonValue]
    parameters: Count
    parameters_of_dense: Count | None
    preset: PathPart
    changed_settings: dict[str, JsonValue] = Field(default_factory=dict)
    steps: Count
    budget: Budget
    seed: Count
    metric: Metric | None
    curve: tuple[CurvePoint, ...] = ()
    train_seconds: Seconds
    cost: CostRecord | None = None
    saved_bytes: Count | None = None
    peak_bytes: Count | None = None
    carries_state: bool | None = None
    probes: tuple[ProbeRecord, ...] = ()

    @property
    def is_guess(self) -> bool:
        """Whether this is the guess without a model, which every mechanism has to beat."""
        return self.placement == "none"

    @model_validator(mode="after")
    def _check_metric(self) -> Self:
        if self.status is Status.OK and self.metric is None:
            raise ValueError("a run with status 'ok' needs a metric")
        if self.metric is not None and self.metric.name != self.task.metric:
            raise ValueError(f"the task is measured by {self.task.metric}, got the metric {self.metric.name}")
        return self


class Timing(Strict):
    """Wall-clock seconds of repeated measurements, at most `MAX_SAMPLES` of them."""

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
