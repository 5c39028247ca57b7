"""What a finished training is worth."""

from __future__ import annotations

from dataclasses import dataclass

from subquad.training.scoring import Measured


@dataclass(frozen=True)
class Outcome:
    """Test scores of a finished run, as (step, validation score, test score), and its learning curve.

    Attributes:
        best_validation: at the evaluation with the best validation score, the earliest of equals.
        last_step: after the last step.
        curve: (step, training loss since the point before, validation score).
        seconds: of training, over all sittings if the run was resumed.
        carries_state: whether the model took its memory from window to window; None where the data were no stream.
    """

    best_validation: tuple[int, float, Measured]
    last_step: tuple[int, float, Measured]
    curve: tuple[tuple[int, float, float], ...]
    seconds: float
    carries_state: bool | None
