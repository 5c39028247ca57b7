"""Progress of a training run, told to whoever draws it, and the time it has taken, kept across interruptions."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from subquad.training.arguments import SCORE

Progress = Callable[[int, int, float | None], None]
"""Called as `progress(step, steps, validation score or None)`."""

_SECONDS_FILE = "seconds.json"


class ProgressCallback(TrainerCallback):
    """Reports every step and evaluation, and writes the seconds spent so far at every checkpoint."""

    def __init__(self, progress: Progress | None, directory: Path) -> None:
        self.progress = progress
        self.directory = directory
        self.seconds_before = 0.0
        self.started = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.seconds_before = read_seconds(self.directory) if state.global_step else 0.0
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report the step."""
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps, None)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report the validation score."""
        score = kwargs["metrics"].get(f"eval_{SCORE}")
        if self.progress is not None and score is not None:
            self.progress(state.global_step, state.max_steps, score)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the time spent."""
        seconds = self.seconds_before + time.perf_counter() - self.started
        (self.directory / _SECONDS_FILE).write_text(json.dumps({"seconds": seconds}), encoding="utf-8")


def read_seconds(directory: Path) -> float:
    """Seconds of training up to the last checkpoint under `directory`; 0 where none is known."""
    try:
        return float(json.loads((directory / _SECONDS_FILE).read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError):
        return 0.0
