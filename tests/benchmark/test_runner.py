"""However a run ends, it is a record that says so."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from safetensors import SafetensorError
from stand_ins import InProcess, MakePlan

from subquad.benchmark import training
from subquad.benchmark.environment import this_environment
from subquad.benchmark.plan import RunPlan
from subquad.benchmark.request import Request
from subquad.benchmark.runner import discard_checkpoints, execute, guess_record, not_trained_record
from subquad.benchmark.worker import Progress, Worker, WorkerDiedError, WorkError
from subquad.records.atomic import OutputError
from subquad.records.schema import Status
from subquad.tasks.kinds import ClassificationData
from subquad.training.checkpoint import DamagedCheckpointError
from subquad.training.presets import Preset


class Failing(Worker):
    """A worker that ends a call with an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def call(self, *arguments: Any, **keywords: Any) -> Any:
        raise self.error


def test_a_finished_run_has_everything_in_its_record(plan: MakePlan, tiny_data: ClassificationData) -> None:
    notes: list[str] = []
    record = execute(plan("full"), tiny_data, InProcess(), lambda done, total, note: notes.append(note))
    assert record.status is Status.OK
    assert record.metric is not None
    assert (record.metric.examples, record.metric.last_step.step) == (60, 24)
    assert [point.step for point in record.curve] == [8, 16, 24]
    assert record.metric.best_validation.validation == max(point.validation or 0 for point in record.curve)
    assert record.parameters == record.parameters_of_dense
    assert record.parameters > 0
    assert record.saved_bytes
    assert record.train_seconds > 0
    assert record.cost is not None
    assert record.mixer == {"name": "full"}
    assert record.task.data_hash == tiny_data.data_hash
    assert notes[0] == ""
    assert notes[-1].startswith("validation ")


@pytest.mark.parametrize(
    ("mechanism", "status", "message"),
    [
        ("NanConfig", Status.DIVERGED, "the training loss became nan at step 1; try a lower learning rate"),
        ("DeviceMemoryConfig", Status.OUT_OF_MEMORY, "OutOfMemoryError: CUDA out of memory. Tried to allocate"),
        ("HostMemoryConfig", Status.OUT_OF_MEMORY, "RuntimeError: DefaultCPUAllocator: can't allocate memory"),
        ("RaisesConfig", Status.FAILED, "ValueError: out of ideas"),
    ],
)
def test_a_run_that_goes_wrong_says_how(
    plan: MakePlan, tiny_data: ClassificationData, mechanism: str, status: Status, message: str
) -> None:
    record = execute(plan(mechanism), tiny_data, InProcess(), None)
    assert record.status is status
    assert record.message.startswith(message)
    assert "\n" not in record.message
    assert record.metric is None
    assert record.parameters == record.parameters_of_dense


def test_a_learning_rate_far_too_high_diverges(plan: MakePlan, tiny: Preset, tiny_data: ClassificationData) -> None:
    wild = replace(tiny, training=replace(tiny.training, learning_rate=1e6))
    assert execute(plan("full", wild), tiny_data, InProcess(), None).status is Status.DIVERGED


@pytest.mark.parametrize(
    ("exit_code", "status", "message"),
    [
        (-9, Status.OUT_OF_MEMORY, "the process was killed by signal 9; the system does so when memory runs out"),
        (-11, Status.FAILED, "the process was killed by signal 11"),
        (1, Status.FAILED, "the process ended with 1"),
    ],
)
def test_a_killed_worker_is_a_record(
    plan: MakePlan, tiny_data: ClassificationData, exit_code: int, status: Status, message: str
) -> None:
    record = execute(plan("full"), tiny_data, Failing(WorkerDiedError(exit_code)), None)
    assert (record.status, record.message) == (status, message)


def test_a_worker_that_can_not_answer_is_a_record(plan: MakePlan, tiny_data: ClassificationData) -> None:
    record = execute(plan("full"), tiny_data, Failing(WorkError("PicklingError", "no way\nat all", "")), None)
    assert (record.status, record.message) == (Status.FAILED, "PicklingError: no way")


@pytest.fixture
def training_ends_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    def set_end(error: Exception) -> None:
        def fail(plan: RunPlan, progress: Progress) -> NoReturn:
            raise error

        monkeypatch.setattr(training, "_train", fail)

    return set_end


def test_a_full_disk_and_a_damaged_checkpoint_are_told_instead_of_recorded(
    plan: MakePlan, tiny_data: ClassificationData, training_ends_with: Callable[[Exception], None]
) -> None:
    training_ends_with(SafetensorError("I/O error: No space left on device (os error 28)"))
    with pytest.raises(OutputError, match=r"checkpoints: a checkpoint can't be written .* free some space"):
        execute(plan("full"), tiny_data, InProcess(), None)
    training_ends_with(DamagedCheckpointError("it is damaged"))
    with pytest.raises(ValueError, match="it is damaged"):
        execute(plan("full"), tiny_data, InProcess(), None)


@pytest.mark.parametrize("name", ["DivergenceError", "DamagedCheckpointError", "OutOfMemoryError"])
def test_an_error_of_a_mechanisms_own_is_that_whatever_it_is_called(
    plan: MakePlan, tiny_data: ClassificationData, training_ends_with: Callable[[Exception], None], name: str
) -> None:
    training_ends_with(type(name, (Exception,), {})("out of ideas"))
    record = execute(plan("full"), tiny_data, InProcess(), None)
    assert (record.status, record.message) == (Status.FAILED, f"{name}: out of ideas")


def test_the_guess_without_a_model_is_a_record(
    request_of: Callable[..., Request], tiny: Preset, tiny_data: ClassificationData
) -> None:
    request = request_of()
    record = guess_record(request, tiny_data, this_environment())
    guess = tiny_data.guess()
    assert record.metric is not None
    assert record.metric.best_validation.test == record.metric.last_step.test == guess.test
    assert record.metric.best_validation.validation == guess.validation
    assert (record.mixer_name, record.message) == ("majority_class", guess.answer)
    assert (record.parameters, record.steps) == (0, 0)
    assert record.command == f"subquad compare --task listops --preset {tiny.source}"
    own = guess_record(replace(request, data=Path("my files"), generated=False), tiny_data, this_environment())
    assert own.command == f"{record.command} --data 'my files'"


def test_what_was_not_trained_has_a_reason_and_no_figures(plan: MakePlan, tiny_data: ClassificationData) -> None:
    record = not_trained_record(plan("ShortConfig"), tiny_data, Status.NOT_APPLICABLE, "short: at most 3 tokens")
    assert (record.status, record.message) == (Status.NOT_APPLICABLE, "short: at most 3 tokens")
    assert (record.parameters, record.cost, record.metric) == (0, None, None)


def test_checkpoints_are_discarded(plan: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "checkpoint-8").mkdir(parents=True)
    discard_checkpoints(plan("full"))
    discard_checkpoints(plan("full"))
    assert not (tmp_path / "checkpoints").exists()
