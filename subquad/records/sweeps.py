"""The record of a sweep: what was tried of each mechanism, what each trial scored on validation, and what was chosen.

The runs have records of their own; this one keeps the choice among them, which they alone don't tell.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from subquad.records.schema import SCHEMA_VERSION, TaskInfo
from subquad.records.strict import Count, PathPart, Strict


class TrialRecord(Strict):
    """One point of the grid: what it varies, and the mean of its best validation scores over the seeds.

    `validation` is None where a seed did not end well; `status` and `reason` then say how.
    """

    varied: dict[str, JsonValue]
    mixer: dict[str, JsonValue]
    validation: float | None
    status: str
    reason: str


class TunedRecord(Strict):
    """A mechanism with its trials in their order, and the `chosen` one of them, None where none ended well.

    The test score is that of the chosen trial; `at_edge` names numbers of which it has the smallest or largest tried.
    """

    mechanism: str
    trials: Annotated[tuple[TrialRecord, ...], Field(min_length=1)]
    chosen: Count | None
    test: float | None
    test_standard_error: float | None
    at_edge: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_chosen(self) -> Self:
        if self.chosen is None:
            return self
        if self.chosen >= len(self.trials) or self.trials[self.chosen].validation is None or self.test is None:
            raise ValueError(f"chosen={self.chosen} is no trial with a validation score, or has no test score")
        return self


class SweepRecord(Strict):
    """A finished sweep, and what is recommended of its chosen trials; `winner` is None where that is no mechanism."""

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    command: str
    hardware: PathPart
    task: TaskInfo
    preset_name: PathPart
    preset: str
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)]
    mechanisms: Annotated[tuple[TunedRecord, ...], Field(min_length=1)]
    recommendation: Annotated[tuple[str, ...], Field(min_length=1)]
    winner: str | None
