"""What a training run is before it is made: preset, mechanism, seed, data; its model, its size and its price."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subquad.benchmark.mixers import NamedMixer
from subquad.benchmark.profiler import cost_record
from subquad.records.schema import Budget, CostRecord, Status, TaskInfo
from subquad.tasks.base import TaskData
from subquad.tasks.registry import load_task
from subquad.training.presets import Preset

if TYPE_CHECKING:  # it loads transformers
    from subquad.training.objectives.base import Objective


@dataclass(frozen=True)
class RunPlan:
    """What decides a run.

    Attributes:
        preset: settings.
        objective: what is trained; see `subquad.training.objectives`.
        mixer: the mechanism.
        seed: of initialisation, data order and dropout.
        data: folder of the task's data.
        generated: whether subquad generated that data, as against files of the user's.
        checkpoints: folder for checkpoints, removed when the record is written.
        save_model: folder for the model at its best validation score, or None.
    """

    preset: Preset
    objective: str
    mixer: NamedMixer
    seed: int
    data: Path
    generated: bool
    checkpoints: Path
    save_model: Path | None = None

    def model_settings(self) -> dict[str, Any]:
        """The model, the mixer aside, as `SubquadConfig` and the record take it."""
        from subquad.training.objectives.registry import OBJECTIVES  # it loads transformers

        return OBJECTIVES[self.objective].model_settings(self.preset.model_dict(), self.mixer.config)

    @property
    def budget(self) -> Budget:
        """Steps, the same for all."""
        return Budget(kind="steps", amount=float(self.preset.training.steps))

    @property
    def command(self) -> str:
        """The command that makes this run again."""
        preset = self.preset
        words = ["subquad", "run", "--task", preset.task, "--preset", preset.text, "--mixer", self.mixer.text]
        words += ["--seed", str(self.seed), *words_of_data(self.data, generated=self.generated)]
        return shlex.join(words)


def words_of_data(directory: Path, *, generated: bool) -> list[str]:
    """The option of a command line that names the user's own files; none for data that subquad generates."""
    return [] if generated else ["--data", str(directory)]


@dataclass(frozen=True)
class Sketch:
    """What is known of a run's model before it is trained.

    Attributes:
        parameters: their number; 0 where the model can't be built.
        cost: price of its blocks for one example of full length; None where the model can't be built.
        status: ok, or not applicable (the mechanism refuses this task), or failed (it raised something else).
        obstacle: why it can't be built, or "".
    """

    parameters: int = 0
    cost: CostRecord | None = None
    status: Status = Status.OK
    obstacle: str = ""


def read_data(preset: Preset, directory: Path, *, generated: bool) -> TaskData[Any]:
    """The task's data, from files that are there."""
    task = load_task(preset.task)
    return task.prepare(directory, preset.data) if generated else task.read(directory, preset.data)


def task_info(data: TaskData[Any]) -> TaskInfo:
    """A task's data, as records keep it."""
    return TaskInfo(
        name=data.name,
        title=data.title,
        is_lra=data.is_lra,
        objective=data.objective,
        metric=data.metric,
        data_hash=data.data_hash,
        train_size=len(data.train),
        validation_size=len(data.validation),
        test_size=len(data.test),
        vocab_size=data.vocab_size,
        num_labels=data.facts().get("num_labels"),
        max_length=data.max_length,
    )


def sketch(plan: RunPlan, data: TaskData[Any]) -> Sketch:
    """Size and price of the run's model, or why it can't be built; nothing is allocated."""
    try:
        with torch.device("meta"):
            model = build_model(plan, data)
        size = sum(parameter.numel() for parameter in model.parameters())
        return Sketch(size, cost_record(objective_of_run(plan, data).cost(model)))
    except ValueError as error:
        return Sketch(status=Status.NOT_APPLICABLE, obstacle=str(error))
    except Exception as error:  # a mechanism of the user's own may raise anything
        return Sketch(status=Status.FAILED, obstacle=first_line(type(error).__name__, str(error)))


def first_line(kind: str, message: str) -> str:
    """An error as a record keeps it: its kind and the first line of its message."""
    lines = message.strip().splitlines()
    return f"{kind}: {lines[0]}" if lines else kind


def objective_of_run(plan: RunPlan, data: TaskData[Any]) -> Objective[Any, Any]:
    """What the run trains."""
    from subquad.training.objectives.registry import objective_of

    return objective_of(data, seed=plan.seed)


def build_model(plan: RunPlan, data: TaskData[Any]) -> Any:
    """The run's model, freshly initialised."""
    return objective_of_run(plan, data).build(plan.model_settings(), plan.mixer.config)
