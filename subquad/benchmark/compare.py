"""The main job: prove, train and profile every named mechanism under one budget, and write it all down.

Each step writes its record before the next one begins and is passed over when its record is there, which is how an
interrupted comparison continues. Nothing is drawn here: an `Observer` hears what happens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from subquad.benchmark.environment import hardware_name, this_environment
from subquad.benchmark.mixers import NamedMixer, parse_mixer
from subquad.benchmark.observer import Observer
from subquad.benchmark.plan import RunPlan, Sketch, sketch, task_info
from subquad.benchmark.profiler import profile_dims
from subquad.benchmark.profiling import profile_mixers
from subquad.benchmark.proving import probe_records, prove
from subquad.benchmark.runner import discard_checkpoints, execute, guess_record, not_trained_record
from subquad.benchmark.worker import Worker
from subquad.records.mechanisms import Mechanism, Mechanisms
from subquad.records.metrics import MetricKind, metric_kind
from subquad.records.schema import DENSE, RunRecord, Status
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
from subquad.training.objectives.registry import OBJECTIVES
from subquad.training.presets import Preset


@dataclass(frozen=True)
class Request:
    """What to compare.

    Attributes:
        preset: task and settings.
        mixers: the mechanisms; dense attention is added if it isn't there.
        seeds: of the runs of each mechanism.
        output: folder of the records.
        data: folder of the task's data.
        generated: whether subquad generates that data, as against files of the user's.
        force: measure again what has a record already.
        save_model: folder for the model of a single run at its best validation score, or None.
    """

    preset: Preset
    mixers: tuple[NamedMixer, ...]
    seeds: tuple[int, ...]
    output: Path
    data: Path
    generated: bool
    force: bool = False
    save_model: Path | None = None

    def with_dense(self) -> Request:
        """The same, with dense attention as the first row: every comparison has it."""
        dense = parse_mixer(DENSE)
        others = tuple(mixer for mixer in self.mixers if mixer.config != dense.config)
        return replace(self, mixers=(dense, *others))


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


def plan_runs(request: Request, data: TaskData[Any]) -> list[PlannedRun]:
    """The runs of a comparison, seed by seed, so that every mechanism has one before any has two.

    Raises:
        ValueError: the preset doesn't go with dense attention, hence with none; or a record is damaged.
    """
    sketches = {mixer.text: sketch(_plan(request, mixer, 0, data), data) for mixer in request.mixers}
    if DENSE in sketches and (obstacle := sketches[DENSE].obstacle):
        raise ValueError(f"preset {request.preset.source}: even dense attention can't be built: {obstacle}")
    runs = [(mixer, _plan(request, mixer, seed, data)) for seed in request.seeds for mixer in request.mixers]
    return [PlannedRun(plan, sketches[mixer.text], _is_recorded(request.output, plan, data)) for mixer, plan in runs]


def compare(request: Request, data: TaskData[Any], observer: Observer) -> None:
    """Make every record of the comparison that isn't there yet.

    Raises:
        OutputError: the output can't be written.
        ValueError: a damaged checkpoint or record is in the way.
    """
    runs = plan_runs(request, data)
    with Worker([mixer.text for mixer in request.mixers]) as worker:
        cards = _prove_and_train(request, runs, data, worker, observer)
        unsound = {planned.plan.mixer.text for planned in runs if planned.sketch.obstacle}
        unsound |= {text for text, card in cards.items() if card.red_probes}
        sound = [mixer for mixer in request.mixers if mixer.text not in unsound]
        causal = OBJECTIVES[data.objective].causal
        sound = [mixer for mixer in sound if _can_be_profiled(mixer, request, observer, causal=causal)]
        settings, output = request.preset.profile, request.output
        profile_mixers(sound, settings, output, worker, observer, causal=causal, force=request.force)


def train(request: Request, data: TaskData[Any], observer: Observer) -> list[Path]:
    """Prove and train alone, without profiles; returns where the records lie. Raises as `compare`."""
    runs = plan_runs(request, data)
    with Worker([mixer.text for mixer in request.mixers]) as worker:
        _prove_and_train(request, runs, data, worker, observer)
    return [_record_path(request.output, planned.plan, data) for planned in runs]


def _prove_and_train(
    request: Request, runs: list[PlannedRun], data: TaskData[Any], worker: Worker, observer: Observer
) -> dict[str, Mechanism]:
    """Cards of what was proved now, by the mixer's text: all that will be trained, or has no card yet."""
    known = _known_cards(request.output)
    due = {planned.plan.mixer.text for planned in runs if request.force or not planned.done}
    proved = [mixer for mixer in request.mixers if mixer.text in due or mixer.config.name not in known]
    cards = {mixer.text: prove(mixer, worker, observer) for mixer in proved}
    _keep_cards(request.output, known, list(cards.values()))
    _write_guess(request, data)
    for planned in runs:
        if planned.done and not request.force:
            observer.say(f"{_title(planned.plan)}: recorded already")
            continue
        card = cards[planned.plan.mixer.text]
        record = _train(planned, data, card, worker, observer)
        write_run(request.output, record.model_copy(update={"probes": probe_records(card)}), force=True)
        discard_checkpoints(planned.plan)
    return cards


def _train(planned: PlannedRun, data: TaskData[Any], card: Mechanism, worker: Worker, observer: Observer) -> RunRecord:
    plan, obstacle = planned.plan, planned.sketch.obstacle
    if obstacle:
        observer.say(f"{_title(plan)}: {planned.sketch.status.value}: {obstacle}")
        return not_trained_record(plan, data, planned.sketch.status, obstacle)
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


def _can_be_profiled(mixer: NamedMixer, request: Request, observer: Observer, *, causal: bool) -> bool:
    try:
        profile_dims(mixer.config, request.preset.profile, causal=causal)
    except ValueError as error:
        observer.say(f"{mixer.text}: no profile: {error}")
        return False
    return True


def _plan(request: Request, mixer: NamedMixer, seed: int, data: TaskData[Any]) -> RunPlan:
    plan = RunPlan(
        preset=request.preset,
        objective=data.objective,
        mixer=mixer,
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
    record = guess_record(request.preset, data, this_environment())
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
    return f"{plan.mixer.text}, seed {plan.seed}"
