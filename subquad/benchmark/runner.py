"""One training run, from a plan to its record. Every end is a record: trained, diverged, out of memory, failed.

The training happens in the worker process (`training`); the record is made by the parent, so that a run whose process
was killed has one too.
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from typing import Any

from subquad.benchmark.environment import this_environment
from subquad.benchmark.mixers import parse_mixer
from subquad.benchmark.plan import RunPlan, first_line, sketch, task_info, words_of_data
from subquad.benchmark.request import Request
from subquad.benchmark.training import Failure, Fault, Trained, train_in_worker
from subquad.benchmark.worker import Progress, Worker, WorkerDiedError, WorkError
from subquad.records.atomic import OutputError
from subquad.records.conventions import DENSE
from subquad.records.metrics import metric_kind
from subquad.records.schema import Budget, Environment, RunRecord, Status, utc_now
from subquad.records.scores import Metric, Score
from subquad.tasks.base import TaskData

_STATUS = {
    Fault.DIVERGED: Status.DIVERGED,
    Fault.OUT_OF_MEMORY: Status.OUT_OF_MEMORY,
    Fault.ERROR: Status.FAILED,
}
"""How a run has ended whose fault is its own."""


def execute(plan: RunPlan, data: TaskData[Any], worker: Worker, progress: Progress | None) -> RunRecord:
    """Run the plan in the worker and make its record.

    Raises:
        OutputError: no checkpoint can be written.
        ValueError: a checkpoint is damaged.
    """
    environment = this_environment()
    try:
        ended: Trained | Failure = worker.call(train_in_worker, plan, progress=progress)
    except WorkerDiedError as error:
        status = Status.OUT_OF_MEMORY if error.out_of_memory else Status.FAILED
        hint = "; the system does so when memory runs out" if error.out_of_memory else ""
        return _record(plan, data, environment, status=status, message=f"{error}{hint}")
    except WorkError as error:
        return _record(plan, data, environment, status=Status.FAILED, message=first_line(error.kind, str(error)))
    if isinstance(ended, Trained):
        return _record(plan, data, environment, trained=ended)
    if ended.fault is Fault.DAMAGED_CHECKPOINT:
        raise ValueError(ended.message)
    if ended.fault is Fault.FULL_DISK:
        raise OutputError(f"{plan.checkpoints}: a checkpoint can't be written ({ended.message}); free some space")
    return _record(plan, data, environment, status=_STATUS[ended.fault], message=ended.message)


def guess_record(request: Request, data: TaskData[Any], environment: Environment) -> RunRecord:
    """The record of the guess without a model: the row that every mechanism has to beat."""
    preset, guess, kind = request.preset, data.guess(), metric_kind(data.metric)
    words = ["subquad", "compare", "--task", preset.task, "--preset", preset.text]
    score = Score(step=0, validation=guess.validation, test=guess.test, test_standard_error=guess.test_standard_error)
    return RunRecord(
        created=utc_now(),
        command=shlex.join([*words, *words_of_data(request.data, generated=request.generated)]),
        mixer={"name": guess.name},
        environment=environment,
        status=Status.OK,
        message=guess.answer,
        task=task_info(data),
        placement="none",
        model={},
        parameters=0,
        parameters_of_dense=None,
        preset=preset.name,
        steps=0,
        budget=Budget(kind="steps", amount=float(preset.training.steps)),
        seed=0,
        metric=Metric(
            name=kind.name,
            higher_is_better=kind.higher_is_better,
            examples=len(data.test),
            asked=guess.asked,
            best_validation=score,
            last_step=score,
        ),
        train_seconds=0.0,
    )


def not_trained_record(plan: RunPlan, data: TaskData[Any], status: Status, message: str) -> RunRecord:
    """The record of a run that was not begun, with the reason."""
    return _record(plan, data, this_environment(), status=status, message=message)


def discard_checkpoints(plan: RunPlan) -> None:
    """Remove the checkpoints of a run whose record is written."""
    shutil.rmtree(plan.checkpoints, ignore_errors=True)


def _record(
    plan: RunPlan,
    data: TaskData[Any],
    environment: Environment,
    *,
    trained: Trained | None = None,
    status: Status = Status.OK,
    message: str = "",
) -> RunRecord:
    ours, dense = sketch(plan, data), sketch(replace(plan, mixer=parse_mixer(DENSE)), data)
    return RunRecord(
        created=utc_now(),
        command=plan.command,
        mixer=plan.mixer.config.to_dict(),
        receipts=trained.receipts if trained else (),
        environment=environment,
        status=status,
        message=message,
        task=task_info(data),
        placement=plan.mixer.config.placement,
        model=plan.model_settings(),
        parameters=ours.parameters,
        parameters_of_dense=None if dense.obstacle else dense.parameters,
        preset=plan.preset.name,
        changed_settings=dict(plan.preset.changed),
        steps=plan.preset.training.steps,
        budget=plan.budget,
        seed=plan.seed,
        metric=trained.metric if trained else None,
        curve=trained.curve if trained else (),
        train_seconds=trained.train_seconds if trained else 0.0,
        cost=ours.cost,
        saved_bytes=trained.saved_bytes if trained else None,
        peak_bytes=trained.peak_bytes if trained else None,
        carries_state=trained.carries_state if trained else None,
    )
