"""The training runs of a request: planned, proved, trained, and written down one by one.

Each run writes its record before the next one begins and is passed over when its record is there, which is how an
interrupted command continues. Nothing is drawn here: an `Observer` hears what happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from subquad.benchmark.environment import hardware_name, this_environment
from subquad.benchmark.mixers import NamedMixer
from subquad.benchmark.observer import Observer
from subquad.benchmark.plan import RunPlan, Sketch, sketch, task_info
from subquad.benchmark.proving import prove
from subquad.benchmark.request import Request
from subquad.benchmark.runner import discard_checkpoints, execute, guess_record, not_trained_record
from subquad.benchmark.worker import Worker
from subquad.config import write_option
from subquad.records.conventions import DENSE
from subquad.records.mechanisms import Mechanism, Mechanisms
from subquad.records.metrics import MetricKind, metric_kind
from subquad.records.schema import RunRecord, Status
from subquad.records.store import (
    MECHANISMS_FILE,
    path_of_run,
    read_mechanisms,
    read_run,
    run_path,
    write_mechanisms,
    write_run,
)
from subquad.tasks.base import TaskData
from subquad.training.presets import Preset


class SetUp(NamedTuple):
    """What is trained, with every seed alike: a mechanism under a preset."""

    mixer: NamedMixer
    preset: Preset


@dataclass(frozen=True)
class PlannedRun:
    """A run before it is made.

    Attributes:
        plan: what decides it.
        sketch: size and price of its model, or why it can't be built.
        done: whether its record exists; one that failed is tried again.
    """

    plan: RunPlan
    sketch: Sketch
    done: bool

    @property
    def training_flops(self) -> float:
        """Of the whole training, estimated as three forward passes per example of full length; 0 if not built."""
        training = self.plan.preset.training
        flops = 0 if self.sketch.cost is None else self.sketch.cost.flops
        return 3.0 * flops * training.batch_size * training.steps


def plan_runs(request: Request, set_ups: Sequence[SetUp], data: TaskData[Any]) -> list[PlannedRun]:
    """The runs of some set-ups, seed by seed, so that every set-up has one before any has two.

    Raises:
        ValueError: the preset doesn't go with dense attention, hence with none; or a record is damaged.
    """
    sketches = {each.mixer.text: sketch(_plan(request, each, 0, data), data) for each in set_ups}
    if DENSE in sketches and (obstacle := sketches[DENSE].obstacle):
        raise ValueError(f"preset {request.preset.text}: even dense attention can't be built: {obstacle}")
    plans = [_plan(request, each, seed, data) for seed in request.seeds for each in set_ups]
    return [PlannedRun(plan, sketches[plan.mixer.text], _is_recorded(request.output, plan, data)) for plan in plans]


def train(request: Request, runs: Sequence[PlannedRun], data: TaskData[Any], observer: Observer) -> list[Path]:
    """Prove and train alone, without profiles; returns where the records lie. Raises as `prove_and_train`.

    Where no model can be built nothing is proved either.
    """
    if all(planned.sketch.obstacle for planned in runs):
        _write_unbuilt(request, runs, data, observer)
    else:
        with Worker(list(mixers_of(runs))) as worker:
            prove_and_train(request, runs, data, worker, observer)
    return [_record_path(request.output, planned.plan, data) for planned in runs]


def mixers_of(runs: Sequence[PlannedRun]) -> dict[str, NamedMixer]:
    """The mixers of the runs, each once, by their texts."""
    return {planned.plan.mixer.text: planned.plan.mixer for planned in runs}


def prove_and_train(
    request: Request, runs: Sequence[PlannedRun], data: TaskData[Any], worker: Worker, observer: Observer
) -> dict[str, Mechanism]:
    """Make every record of the runs that isn't there yet, first of those whose model can't be built.

    Returns:
        Cards of what was proved now, by the mixer's text: all that will be trained, or has no card yet.

    Raises:
        OutputError: the output can't be written.
        ValueError: a damaged checkpoint or record is in the way.
    """
    _write_unbuilt(request, runs, data, observer)
    known = _known_cards(request.output)
    built = [planned for planned in runs if not planned.sketch.obstacle]
    due = {planned.plan.mixer.text for planned in built if request.force or not planned.done}
    proved = [mixer for text, mixer in mixers_of(runs).items() if text in due or mixer.config.name not in known]
    cards = {mixer.text: prove(mixer, worker, observer) for mixer in proved}
    _keep_cards(request.output, known, list(cards.values()))
    _write_guess(request, data)
    for planned in built:
        if planned.done and not request.force:
            observer.say(f"{_title(planned.plan)}: recorded already")
            continue
        card = cards[planned.plan.mixer.text]
        record = _train(planned, data, card, worker, observer)
        write_run(request.output, record.model_copy(update={"probes": card.probes}), force=True)
        discard_checkpoints(planned.plan)
    return cards


def _write_unbuilt(request: Request, runs: Sequence[PlannedRun], data: TaskData[Any], observer: Observer) -> None:
    """Say which models can't be built and why, and write their records; before any work, for it is known already."""
    for planned in runs:
        plan, status, obstacle = planned.plan, planned.sketch.status, planned.sketch.obstacle
        if not obstacle:
            continue
        observer.say(f"{_title(plan)}: {status.value}: {obstacle}")
        if request.force or not planned.done:
            write_run(request.output, not_trained_record(plan, data, status, obstacle), force=True)


def _train(planned: PlannedRun, data: TaskData[Any], card: Mechanism, worker: Worker, observer: Observer) -> RunRecord:
    plan = planned.plan
    if card.red_probes:
        names = ", ".join(dict.fromkeys(probe.name for probe in card.red_probes))
        return not_trained_record(plan, data, Status.FAILED, f"not trained, since proofs failed: {names}")
    step = observer.begin(f"train {_title(plan)}")
    record = execute(plan, data, worker, step.progress)
    step.end(_outcome(record, metric_kind(data.metric)), failed=record.metric is None)
    return record


def _outcome(record: RunRecord, kind: MetricKind) -> str:
    if record.metric is None:
        return f"{record.status.value}: {record.message}"
    return f"test {kind.write(record.metric.best_validation.test)}"


def _plan(request: Request, set_up: SetUp, seed: int, data: TaskData[Any]) -> RunPlan:
    plan = RunPlan(
        preset=set_up.preset,
        objective=data.objective,
        mixer=set_up.mixer,
        seed=seed,
        data=request.data,
        generated=request.generated,
        checkpoints=request.output,
        save_model=request.save_model,
    )
    record = _record_path(request.output, plan, data)
    return replace(
        plan, checkpoints=request.output / "checkpoints" / record.relative_to(request.output).with_suffix("")
    )


def _record_path(output: Path, plan: RunPlan, data: TaskData[Any]) -> Path:
    return run_path(
        output,
        hardware=hardware_name(),
        task=task_info(data),
        preset=plan.preset.name,
        mixer=plan.mixer.config.to_dict(),
        model=plan.model_settings(),
        budget=plan.budget,
        seed=plan.seed,
    )


def _is_recorded(output: Path, plan: RunPlan, data: TaskData[Any]) -> bool:
    path = _record_path(output, plan, data)
    if not path.exists():
        return False
    return read_run(path).status is not Status.FAILED  # a damaged record raises, with its path


def _write_guess(request: Request, data: TaskData[Any]) -> None:
    record = guess_record(request, data, this_environment())
    if request.force or not path_of_run(request.output, record).exists():
        write_run(request.output, record, force=request.force)


def _known_cards(output: Path) -> dict[str, Mechanism]:
    path = output / MECHANISMS_FILE
    return {card.name: card for card in read_mechanisms(path).mechanisms} if path.exists() else {}


def _keep_cards(output: Path, known: dict[str, Mechanism], cards: list[Mechanism]) -> None:
    """Write the cards, one for each name; those of mechanisms that were not proved now stay."""
    by_name = dict(known)
    for name in {card.name for card in cards}:
        same = [card for card in cards if card.name == name]
        by_name[name] = same[0].model_copy(update={"probes": tuple(probe for card in same for probe in card.probes)})
    write_mechanisms(output, Mechanisms(mechanisms=tuple(by_name[name] for name in sorted(by_name))))


def _title(plan: RunPlan) -> str:
    changed = [write_option(name, value) for name, value in plan.preset.changed.items()]
    return ", ".join([plan.mixer.text, *changed, f"seed {plan.seed}"])
