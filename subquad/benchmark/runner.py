"""One training run, from a plan to its record. Every end is a record: trained, diverged, out of memory, failed.

The functions named `*_in_worker` run in the worker process and return plain values; the record is made by the parent,
so that a run whose process was killed has one too.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from subquad.benchmark.environment import this_environment
from subquad.benchmark.memory import saved_bytes
from subquad.benchmark.mixers import parse_mixer
from subquad.benchmark.plan import (
    RunPlan,
    build_model,
    first_line,
    objective_of_run,
    read_data,
    sketch,
    task_info,
)
from subquad.benchmark.saving import save_model
from subquad.benchmark.worker import Progress, Worker, WorkerDiedError, WorkError
from subquad.receipt import Receipt, receipts
from subquad.records.atomic import OutputError
from subquad.records.conventions import DENSE
from subquad.records.metrics import MetricKind, metric_kind
from subquad.records.schema import (
    Budget,
    Environment,
    ReceiptRecord,
    RunRecord,
    Status,
    utc_now,
)
from subquad.records.scores import CurvePoint, Metric, PositionBucket, Score
from subquad.tasks.base import TaskData
from subquad.training.outcome import Outcome
from subquad.training.presets import Preset

_SIGNS_OF_A_FULL_DISK = ("No space left", "Disk quota exceeded", "PytorchStreamWriter", "inline_container.cc")
"""What the system says, and what torch says instead when it can't write a file to its end."""
_SIGNS_OF_FULL_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")


@dataclass(frozen=True)
class Trained:
    """What the worker found."""

    metric: Metric
    curve: tuple[CurvePoint, ...]
    train_seconds: float
    carries_state: bool | None
    saved_bytes: int
    peak_bytes: int | None
    receipts: tuple[ReceiptRecord, ...]


def execute(plan: RunPlan, data: TaskData[Any], worker: Worker, progress: Progress | None) -> RunRecord:
    """Run the plan in the worker and make its record."""
    try:
        trained = worker.call(train_in_worker, plan, progress=progress)
        return _record(plan, data, this_environment(), trained=trained)
    except WorkerDiedError as error:
        status = Status.OUT_OF_MEMORY if error.out_of_memory else Status.FAILED
        hint = "; the system does so when memory runs out" if error.out_of_memory else ""
        return _record(plan, data, this_environment(), status=status, message=f"{error}{hint}")
    except WorkError as error:
        if error.kind == "CheckpointError":
            raise ValueError(str(error)) from error
        if any(sign in str(error) for sign in _SIGNS_OF_A_FULL_DISK):
            raise OutputError(
                f"{plan.checkpoints}: a checkpoint can't be written ({error}); free some space"
            ) from error
        return _record(plan, data, this_environment(), status=_status(error), message=_message(error))


def train_in_worker(plan: RunPlan, progress: Progress) -> Trained:
    """Train and score; called in the worker process."""
    import transformers

    from subquad.training.trainer import SubquadTrainer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # the worker has made other runs before
    data = read_data(plan.preset, plan.data, generated=plan.generated)
    objective = objective_of_run(plan, data)
    torch.manual_seed(plan.seed)
    with receipts() as collected:
        model = build_model(plan, data)
        trainer = SubquadTrainer(
            model,
            objective,
            plan.preset.training,
            directory=plan.checkpoints,
            progress=_with_note(progress, objective.kind),
        )
        outcome = trainer.fit()
    if plan.save_model is not None:
        save_model(model, plan.save_model)
    batch = trainer.first_batch()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return Trained(
        metric=_metric(outcome, objective.kind),
        curve=tuple(CurvePoint(step=s, train_loss=loss, validation=v) for s, loss, v in outcome.curve),
        train_seconds=outcome.seconds,
        carries_state=outcome.carries_state,
        saved_bytes=saved_bytes(lambda: model.train()(**batch).loss, model.parameters()),
        peak_bytes=peak,
        receipts=tuple(receipt_record(receipt) for receipt in collected.entries),
    )


def _metric(outcome: Outcome, kind: MetricKind) -> Metric:
    scored = (outcome.best_validation, outcome.last_step)
    best, last = (
        Score(
            step=step,
            validation=validation,
            test=test.estimate.value,
            test_standard_error=test.estimate.standard_error,
        )
        for step, validation, test in scored
    )
    of_best = outcome.best_validation[2]
    return Metric(
        name=kind.name,
        higher_is_better=kind.higher_is_better,
        examples=of_best.examples,
        asked=of_best.asked,
        best_validation=best,
        last_step=last,
        by_position=tuple(
            PositionBucket(first=b.first, last=b.last, asked=b.asked, value=b.value) for b in of_best.by_position
        ),
    )


def guess_record(preset: Preset, data: TaskData[Any], environment: Environment) -> RunRecord:
    """The record of the guess without a model: the row that every mechanism has to beat."""
    guess, kind = data.guess(), metric_kind(data.metric)
    score = Score(step=0, validation=guess.validation, test=guess.test, test_standard_error=guess.test_standard_error)
    return RunRecord(
        created=utc_now(),
        command=shlex.join(["subquad", "compare", "--task", preset.task, "--preset", preset.text]),
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


def receipt_record(receipt: Receipt) -> ReceiptRecord:
    """A receipt, as records keep it."""
    return ReceiptRecord(
        where=receipt.where, asked=receipt.asked, ran=receipt.ran, reason=receipt.reason, count=receipt.count
    )


def _status(error: WorkError) -> Status:
    if error.kind == "DivergenceError":
        return Status.DIVERGED
    full = error.kind in ("OutOfMemoryError", "MemoryError") or any(
        sign in str(error) for sign in _SIGNS_OF_FULL_MEMORY
    )
    return Status.OUT_OF_MEMORY if full else Status.FAILED


def _message(error: WorkError) -> str:
    return str(error) if error.kind == "DivergenceError" else first_line(error.kind, str(error))


def _with_note(progress: Progress, kind: MetricKind) -> Callable[[int, int, float | None], None]:
    """Keeps the last validation score beside the bar."""
    note = ""

    def report(step: int, steps: int, validation: float | None) -> None:
        nonlocal note
        if validation is not None:
            note = f"validation {kind.write(validation)}"
        progress(step, steps, note)

    return report


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
