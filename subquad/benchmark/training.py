"""The training of one run, in the worker process: from a plan to plain values, whether it ends well or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

import torch

from subquad.benchmark.memory import saved_bytes
from subquad.benchmark.plan import RunPlan, build_model, first_line, objective_of_run, read_data
from subquad.benchmark.profiler import receipt_record
from subquad.benchmark.saving import save_model
from subquad.benchmark.worker import Progress
from subquad.divergence import DivergenceError
from subquad.receipt import receipts
from subquad.records.metrics import MetricKind
from subquad.records.schema import ReceiptRecord
from subquad.records.scores import CurvePoint, Metric, PositionBucket, Score
from subquad.training.outcome import Outcome

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


class Fault(Enum):
    """What ended a run before it was scored."""

    DIVERGED = auto()
    OUT_OF_MEMORY = auto()
    DAMAGED_CHECKPOINT = auto()
    FULL_DISK = auto()
    ERROR = auto()


@dataclass(frozen=True)
class Failure:
    """A run without scores: why, and one line that says so."""

    fault: Fault
    message: str


def train_in_worker(plan: RunPlan, progress: Progress) -> Trained | Failure:
    """Train and score; called in the worker process."""
    from subquad.training.checkpoint import DamagedCheckpointError

    try:
        return _train(plan, progress)
    except DamagedCheckpointError as error:
        return Failure(Fault.DAMAGED_CHECKPOINT, str(error))
    except DivergenceError as error:
        return Failure(Fault.DIVERGED, str(error))
    except Exception as error:
        return Failure(_fault(error), first_line(type(error).__name__, str(error)))


def _fault(error: Exception) -> Fault:
    text = str(error)
    if any(sign in text for sign in _SIGNS_OF_A_FULL_DISK):
        return Fault.FULL_DISK
    full = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in text for sign in _SIGNS_OF_FULL_MEMORY
    )
    return Fault.OUT_OF_MEMORY if full else Fault.ERROR


def _train(plan: RunPlan, progress: Progress) -> Trained:
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


def _with_note(progress: Progress, kind: MetricKind) -> Callable[[int, int, float | None], None]:
    """Keeps the last validation score beside the bar."""
    note = ""

    def report(step: int, steps: int, validation: float | None) -> None:
        nonlocal note
        if validation is not None:
            note = f"validation {kind.write(validation)}"
        progress(step, steps, note)

    return report
