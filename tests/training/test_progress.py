import json
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from subquad.training import progress as module
from subquad.training.progress import ProgressCallback, read_seconds


class Clock:
    """Tells the times it is set to."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def train(callback: ProgressCallback, directory: Path, clock: Clock, step: int, seconds: float) -> None:
    """A sitting that begins after `step` steps and saves after so many seconds."""
    arguments, control = TrainingArguments(output_dir=str(directory)), TrainerControl()
    state = TrainerState(global_step=step, max_steps=10)
    callback.on_train_begin(arguments, state, control)
    clock.now += seconds
    callback.on_save(arguments, state, control)


def test_the_time_of_all_sittings_adds_up_and_a_new_run_starts_at_zero(tmp_path: Path, clock: Clock) -> None:
    train(ProgressCallback(None, tmp_path), tmp_path, clock, step=0, seconds=5)
    assert read_seconds(tmp_path) == 5
    train(ProgressCallback(None, tmp_path), tmp_path, clock, step=4, seconds=2)
    assert read_seconds(tmp_path) == 7
    train(ProgressCallback(None, tmp_path), tmp_path, clock, step=0, seconds=3)
    assert read_seconds(tmp_path) == 3


@pytest.mark.parametrize("text", ["", "{", "{}", '{"seconds": "soon"}'])
def test_a_damaged_time_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "seconds.json").write_text(text)
    assert read_seconds(tmp_path) == 0


def test_no_time_is_known_before_the_first_checkpoint(tmp_path: Path) -> None:
    assert read_seconds(tmp_path) == 0
    assert json.dumps(read_seconds(tmp_path)) == "0.0"


def test_steps_and_validation_scores_are_told_and_test_scores_are_not(tmp_path: Path) -> None:
    heard: list[tuple[int, int, float | None]] = []
    callback = ProgressCallback(lambda *event: heard.append(event), tmp_path)
    arguments, control = TrainingArguments(output_dir=str(tmp_path)), TrainerControl()
    state = TrainerState(global_step=3, max_steps=10)
    callback.on_step_end(arguments, state, control)
    callback.on_evaluate(arguments, state, control, metrics={"eval_score": 0.5})
    callback.on_evaluate(arguments, state, control, metrics={"test_score": 0.6})
    assert heard == [(3, 10, None), (3, 10, 0.5)]
