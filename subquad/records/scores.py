"""What a run scored: the metric on validation and test, by position, and along the training.

JSON has no NaN: a training loss that is not finite is kept as null, every other figure must be finite.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from subquad.records.metrics import metric_kind
from subquad.records.strict import Count, FiniteOrNone, Measurement, Strict


class Score(Strict):
    """The metric on the validation and test splits after `step` steps, and the standard error of the test value.

    The error is the one that the size of the test split causes: binomial for the accuracy of a classifier, over test
    examples otherwise (`metrics.estimate`).
    """

    step: Count
    validation: Measurement
    test: Measurement
    test_standard_error: Measurement


class PositionBucket(Strict):
    """The metric over the test questions at the positions `first` to `last`, counted from 0.

    Positions are those of an example or, where its windows were read as a stream, of the document, counted from its
    first window in the same row of the batch.
    """

    first: Count
    last: Count
    asked: Annotated[int, Field(ge=1)]
    value: Measurement


class Metric(Strict):
    """The result of a run: the score at the step with the best validation value, and the score at the last step.

    `examples` is the number of test examples, `asked` that of their questions: labels, or tokens to predict.
    `by_position` holds the best-validation score by position in buckets that double, where the objective has positions.
    """

    name: str
    higher_is_better: bool
    examples: Annotated[int, Field(ge=1)]
    asked: Annotated[int, Field(ge=1)]
    best_validation: Score
    last_step: Score
    by_position: tuple[PositionBucket, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        kind = metric_kind(self.name)
        if self.higher_is_better is not kind.higher_is_better:
            raise ValueError(f"{self.name}: {kind.direction}, got higher_is_better={self.higher_is_better}")
        for score in (self.best_validation, self.last_step):
            kind.check(score.validation)
            kind.check(score.test)
        for bucket in self.by_position:
            kind.check(bucket.value)
        places = [place for bucket in self.by_position for place in (bucket.first, bucket.last + 1)]
        if places != sorted(places):
            raise ValueError(f"expected buckets of increasing positions, got {places}")
        return self


class CurvePoint(Strict):
    """One point of a learning curve; `train_loss` is None where it was not finite, `validation` where not measured."""

    step: Count
    train_loss: FiniteOrNone
    validation: Measurement | None = None
