"""Training ends the same way however often it was interrupted, and says so when it can't go on."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toy_data import trainer_of

from subquad.divergence import DivergenceError
from subquad.records.metrics import Estimate
from subquad.tasks.kinds import ClassificationData
from subquad.training.checkpoint import DamagedCheckpointError, checkpoint_path
from subquad.training.objectives.registry import objective_of
from subquad.training.order import Visit
from subquad.training.outcome import Outcome
from subquad.training.presets import Preset
from subquad.training.progress import Progress
from subquad.training.scoring import Measured
from subquad.training.trainer import SubquadTrainer

CHECKPOINT_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")

Make = Callable[..., SubquadTrainer]


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def make(tiny: Preset, tiny_data: ClassificationData) -> Make:
    """A trainer under the tiny preset, as the worker makes it."""

    def make_trainer(directory: Path, progress: Progress | None = None, **options: Any) -> SubquadTrainer:
        return trainer_of(tiny_data, tiny, directory, progress=progress, **options)

    return make_trainer


@pytest.fixture(scope="module")
def whole(make: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """A run without interruption, and its folder; tests copy it before they change it."""
    directory = tmp_path_factory.mktemp("whole")
    return make(directory).fit(), directory


def facts(outcome: Outcome) -> tuple[object, ...]:
    """All of an outcome but its time."""
    return outcome.best_validation, outcome.last_step, outcome.curve


def weights_of(trainer: SubquadTrainer) -> dict[str, Tensor]:
    assert trainer.model is not None
    return trainer.model.state_dict()


def last_weights(directory: Path) -> dict[str, Tensor]:
    return load_file(checkpoint_path(directory, 24) / "model.safetensors")


def assert_same(outcome: Outcome, directory: Path, whole: tuple[Outcome, Path]) -> None:
    assert facts(outcome) == facts(whole[0])
    ours, theirs = last_weights(directory), last_weights(whole[1])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def stopping(at: int, *, evaluating: bool) -> Progress:
    def progress(step: int, steps: int, validation: float | None) -> None:
        if step == at and (validation is not None) == evaluating:
            raise StoppedError

    return progress


@pytest.mark.parametrize(("at", "evaluating"), [(3, False), (13, False), (16, True), (24, True)])
def test_an_interrupted_run_continues_bit_for_bit(
    make: Make, whole: tuple[Outcome, Path], tmp_path: Path, at: int, evaluating: bool
) -> None:
    with pytest.raises(StoppedError):
        make(tmp_path, stopping(at, evaluating=evaluating)).fit()
    torch.rand(100)
    assert_same(make(tmp_path).fit(), tmp_path, whole)


def test_a_run_interrupted_twice_continues_bit_for_bit(make: Make, whole: tuple[Outcome, Path], tmp_path: Path) -> None:
    for at in (11, 19):
        with pytest.raises(StoppedError):
            make(tmp_path, stopping(at, evaluating=False)).fit()
    assert_same(make(tmp_path).fit(), tmp_path, whole)


def scoring(monkeypatch: pytest.MonkeyPatch, scores: list[float], then: float = 0.5) -> None:
    """Let the evaluations have these scores, one after the other, and then another."""
    coming = iter(scores)

    def measure(self: SubquadTrainer, prediction: object) -> dict[str, float]:
        score = next(coming, then)
        self._measured = Measured(Estimate(score, 0.1), examples=60, asked=60, by_position=())
        return {"score": score}

    monkeypatch.setattr(SubquadTrainer, "_measure", measure)


def values(scored: tuple[int, float, Measured]) -> tuple[int, float, float]:
    step, validation, test = scored
    return step, validation, test.estimate.value


def test_a_moved_run_keeps_its_best_checkpoint(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scoring(monkeypatch, [0.9, 0.1], then=0.2)
    with pytest.raises(StoppedError):
        make(tmp_path / "here", stopping(20, evaluating=False)).fit()
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert values(make(tmp_path / "there").fit().best_validation) == (8, 0.9, 0.2)


SCRIPT = """
import os, signal, sys
import torch
from pathlib import Path
from subquad.tasks.registry import load_task
from subquad.training.presets import load_preset
sys.path.insert(0, sys.argv[3])
from toy_data import trainer_of

def progress(step, steps, validation):
    if step == 21:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
directory = Path(sys.argv[1])
preset = load_preset("listops", sys.argv[2])
data = load_task("listops").prepare(directory / "data", preset.data)
trainer_of(data, preset, directory, progress=progress).fit()
"""


@pytest.mark.slow
def test_a_killed_process_is_continued_bit_for_bit(
    make: Make, tiny: Preset, whole: tuple[Outcome, Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), tiny.source, str(Path(__file__).parent)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert checkpoint_path(tmp_path, 16).exists()
    assert_same(make(tmp_path).fit(), tmp_path, whole)


def counting(steps: list[int]) -> Progress:
    def progress(step: int, of: int, validation: float | None) -> None:
        if validation is None:
            steps.append(step)

    return progress


def test_a_finished_run_is_only_scored(make: Make, whole: tuple[Outcome, Path], tmp_path: Path) -> None:
    shutil.copytree(whole[1], tmp_path, dirs_exist_ok=True)
    steps: list[int] = []
    assert_same(make(tmp_path, counting(steps)).fit(), tmp_path, whole)
    assert steps == []


@pytest.mark.parametrize("state", [None, "", '{"global_step": 16', '{"global_step": 3}', "[]"])
def test_a_half_written_checkpoint_is_passed_over(
    make: Make, whole: tuple[Outcome, Path], tmp_path: Path, state: str | None
) -> None:
    with pytest.raises(StoppedError):
        make(tmp_path, stopping(18, evaluating=False)).fit()
    half = checkpoint_path(tmp_path, 16)
    (half / "model.safetensors").write_bytes(b"half")
    (half / "trainer_state.json").unlink()
    if state is not None:
        (half / "trainer_state.json").write_text(state)
    steps: list[int] = []
    assert_same(make(tmp_path, counting(steps)).fit(), tmp_path, whole)
    assert steps == list(range(9, 25))


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_damaged_checkpoint_is_named(make: Make, whole: tuple[Outcome, Path], tmp_path: Path, name: str) -> None:
    shutil.copytree(whole[1], tmp_path, dirs_exist_ok=True)
    path = checkpoint_path(tmp_path, 24) / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        DamagedCheckpointError, match=rf"checkpoint-24/{name}: the checkpoint is damaged .*; delete the folder"
    ):
        make(tmp_path).fit()


def test_a_damaged_best_checkpoint_is_named(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scoring(monkeypatch, [0.9, 0.1, 0.2])

    def damage(step: int, steps: int, validation: float | None) -> None:
        if step == 20:
            (checkpoint_path(tmp_path, 8) / "model.safetensors").unlink()

    with pytest.raises(DamagedCheckpointError, match=r"checkpoint-8/model.safetensors: the checkpoint is damaged"):
        make(tmp_path, damage).fit()


def test_the_best_step_is_the_earliest_of_equals_and_its_weights_are_scored(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring(monkeypatch, [0.1, 0.7, 0.7, 0.5, 0.6])  # three on validation, then the last and the best model on test
    trainer = make(tmp_path)
    outcome = trainer.fit()
    assert values(outcome.best_validation) == (16, 0.7, 0.6)
    assert values(outcome.last_step) == (24, 0.7, 0.5)
    best = load_file(checkpoint_path(tmp_path, 16) / "model.safetensors")
    scored = weights_of(trainer)
    assert all(torch.equal(scored[name], weights) for name, weights in best.items())


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tokens of every training batch, in order."""
    seen: list[Tensor] = []
    original = SubquadTrainer.training_step

    def recording(self: SubquadTrainer, model: object, inputs: dict[str, Tensor], *rest: object) -> Tensor:
        seen.append(inputs["input_ids"].clone())
        return original(self, model, inputs, *rest)  # pyright: ignore[reportArgumentType] - handed on as they came

    monkeypatch.setattr(SubquadTrainer, "training_step", recording)
    return seen


def test_equal_seeds_give_every_mechanism_the_same_data_in_the_same_order(
    make: Make, tmp_path: Path, batches: list[Tensor]
) -> None:
    for index, (mixer, seed) in enumerate([("full", 0), ("linear", 0), ("full", 1)]):
        make(tmp_path / str(index), mixer=mixer, seed=seed).fit()
    first, second, other = batches[:24], batches[24:48], batches[48:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_equal_seeds_give_equal_initial_weights(make: Make, tmp_path: Path) -> None:
    first, second, other = (weights_of(make(tmp_path, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("mixer", ["full", "local:window=9", "linear", "longformer:window=9", "performer"])
def test_an_evaluation_does_not_depend_on_who_is_in_the_batch(
    make: Make, tiny_data: ClassificationData, tmp_path: Path, mixer: str
) -> None:
    model = make(tmp_path, mixer=mixer).model
    assert model is not None
    model.eval()
    objective = objective_of(tiny_data, seed=0)
    collate = objective.collator
    examples = [objective.example(tiny_data.test, Visit(index, -1)) for index in range(24)]
    with torch.no_grad():
        together = model(**collate(examples)).logits
        alone = torch.cat([model(**collate([example])).logits for example in examples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run_at_once(make: Make, tmp_path: Path) -> None:
    steps: list[int] = []
    trainer = make(tmp_path, counting(steps), learning_rate=1e6)
    with pytest.raises(DivergenceError, match=r"the training loss became nan at step \d+; try a lower learning rate"):
        trainer.fit()
    assert len(steps) < 24


def test_a_validation_loss_that_is_not_finite_is_no_score(make: Make, tmp_path: Path) -> None:
    trainer = make(tmp_path)
    weights_of(trainer)["head.classify.bias"].fill_(torch.nan)
    with pytest.raises(DivergenceError, match=r"the validation loss became nan at step 0"):
        trainer.evaluate()


def test_the_first_batch_is_the_same_for_every_mechanism(make: Make, tmp_path: Path) -> None:
    first, second = (make(tmp_path, mixer=mixer).first_batch() for mixer in ("full", "linear"))
    assert first["input_ids"].shape[0] == 8
    assert all(torch.equal(first[name], second[name]) for name in first)
