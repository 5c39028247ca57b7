"""The main job: prove, train and profile every named mechanism under one budget, and write it all down.

Each step writes its record before the next one begins and is passed over when its record is there, which is how an
interrupted comparison continues. Nothing is drawn here: an `Observer` hears what happens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from subquad.benchmark.environment import this_environment
from subquad.benchmark.mechanism_card import mechanism_card
from subquad.benchmark.mixers import NamedMixer, parse_mixer
from subquad.benchmark.observer import Observer
from subquad.benchmark.plan import RunPlan, sketch, task_info
from subquad.benchmark.probes import ProbeResult, offered_forms, run_probes
from subquad.benchmark.profiling import profile_mixers
from subquad.benchmark.runner import discard_checkpoints, execute, majority_record, not_trained_record
from subquad.benchmark.worker import Progress, Worker
from subquad.build import make_dims
from subquad.records.mechanisms import Mechanism, Mechanisms
from subquad.records.schema import DENSE, ProbeRecord, RunRecord, Status
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

PICTURE_LENGTH = 32
"""Tokens in the picture of who attends whom."""


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
    """

    preset: Preset
    mixers: tuple[NamedMixer, ...]
    seeds: tuple[int, ...]
    output: Path
    data: Path
    generated: bool
    force: bool = False

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
        parameters: of its model; None where it can't be built.
        training_flops: of the whole training, estimated as three forward passes per example of full length.
        done: whether its record exists; one that failed is tried again.
        obstacle: why it can't be built, or "".
    """

    plan: RunPlan
    parameters: int | None
    training_flops: float
    done: bool
    obstacle: str = ""


def plan_runs(request: Request, data: TaskData) -> list[PlannedRun]:
    """The runs of a comparison, seed by seed, so that every mechanism has one before any has two."""
    return [
        _planned(request, _plan(request, mixer, seed, data), data) for seed in request.seeds for mixer in request.mixers
    ]


def compare(request: Request, data: TaskData, observer: Observer) -> None:
    """Make every record of the comparison that isn't there yet.

    Raises:
        OutputError: the output can't be written.
        ValueError: a damaged checkpoint or record is in the way.
    """
    runs = plan_runs(request, data)
    with Worker([mixer.text for mixer in request.mixers]) as worker:
        cards = _prove_and_train(request, runs, data, worker, observer)
        unsound = {planned.plan.mixer.text for planned in runs if planned.obstacle}
        unsound |= {text for text, card in cards.items() if card.red_probes}
        sound = [mixer for mixer in request.mixers if mixer.text not in unsound]
        profile_mixers(sound, request.preset.profile, request.output, worker, observer, force=request.force)


def train(request: Request, data: TaskData, observer: Observer) -> list[Path]:
    """Prove and train alone, without profiles; returns where the records lie. Raises as `compare`."""
    runs = plan_runs(request, data)
    with Worker([mixer.text for mixer in request.mixers]) as worker:
        _prove_and_train(request, runs, data, worker, observer)
    return [_record_path(request.output, planned.plan, data) for planned in runs]


def _prove_and_train(
    request: Request, runs: list[PlannedRun], data: TaskData, worker: Worker, observer: Observer
) -> dict[str, Mechanism]:
    cards = {mixer.text: _prove(mixer, worker, observer) for mixer in request.mixers}
    _keep_cards(request.output, list(cards.values()))
    _write_majority(request, data)
    for planned in runs:
        if planned.done and not request.force:
            observer.say(f"{_title(planned.plan)}: recorded already")
            continue
        card = cards[planned.plan.mixer.text]
        record = _train(planned, data, card, worker, observer)
        write_run(request.output, record.model_copy(update={"probes": _outcomes(card)}), force=True)
        discard_checkpoints(planned.plan)
    return cards


def prove_in_worker(text: str, progress: Progress) -> Mechanism:
    """Every probe of every form that a mechanism offers, and its pictures; called in the worker process."""
    config = parse_mixer(text).config
    dims = make_dims(embed_dim=16, num_heads=2, max_length=64)
    results: list[tuple[str, ProbeResult]] = []
    forms = offered_forms(config, dims)
    for index, form in enumerate(forms):
        kind = "causal" if form.causal else "cross" if form.cross else "bidirectional"
        progress(index, len(forms), kind)
        results += [(kind, result) for result in run_probes(config, form)]
    return mechanism_card(config, results, length=PICTURE_LENGTH)


def _prove(mixer: NamedMixer, worker: Worker, observer: Observer) -> Mechanism:
    step = observer.begin(f"prove {mixer.text}")
    card = worker.call(prove_in_worker, mixer.text, progress=step.progress)
    passed = sum(probe.passed for probe in card.probes)
    step.end(f"{passed} of {len(card.probes)} proofs hold", failed=bool(card.red_probes))
    for probe in card.red_probes:
        observer.say(f"{mixer.text}: {probe.name}: {probe.detail}")
    return card


def _outcomes(card: Mechanism) -> tuple[ProbeRecord, ...]:
    return tuple(ProbeRecord(name=p.name, passed=p.passed, detail=p.detail, seconds=0.0) for p in card.probes)


def _train(planned: PlannedRun, data: TaskData, card: Mechanism, worker: Worker, observer: Observer) -> RunRecord:
    plan = planned.plan
    if planned.obstacle:
        observer.say(f"{_title(plan)}: not applicable: {planned.obstacle}")
        return not_trained_record(plan, data, Status.NOT_APPLICABLE, planned.obstacle)
    if card.red_probes:
        names = ", ".join(dict.fromkeys(probe.name for probe in card.red_probes))
        return not_trained_record(plan, data, Status.FAILED, f"not trained, since proofs failed: {names}")
    step = observer.begin(f"train {_title(plan)}")
    record = execute(plan, data, worker, step.progress)
    step.end(_outcome(record), failed=record.metric is None)
    return record


def _outcome(record: RunRecord) -> str:
    if record.metric is None:
        return f"{record.status.value}: {record.message}"
    return f"test {100 * record.metric.best_validation.test:.1f} %"


def _plan(request: Request, mixer: NamedMixer, seed: int, data: TaskData) -> RunPlan:
    plan = RunPlan(request.preset, mixer, seed, request.data, request.generated, request.output)
    record = _record_path(request.output, plan, data)
    return replace(
        plan, checkpoints=request.output / "checkpoints" / record.relative_to(request.output).with_suffix("")
    )


def _planned(request: Request, plan: RunPlan, data: TaskData) -> PlannedRun:
    done = _is_recorded(request.output, plan, data)
    try:
        parameters, cost = sketch(plan, data)
    except ValueError as error:
        return PlannedRun(plan, None, 0.0, done, str(error))
    training = plan.preset.training
    return PlannedRun(plan, parameters, 3.0 * cost.flops * training.batch_size * training.steps, done)


def _record_path(output: Path, plan: RunPlan, data: TaskData) -> Path:
    return run_path(
        output,
        hardware=this_environment().hardware,
        task=task_info(data),
        preset=plan.preset.name,
        mixer=plan.mixer.config.to_dict(),
        model=plan.model_settings(),
        budget=plan.budget,
        seed=plan.seed,
    )


def _is_recorded(output: Path, plan: RunPlan, data: TaskData) -> bool:
    path = _record_path(output, plan, data)
    if not path.exists():
        return False
    return read_run(path).status is not Status.FAILED  # a damaged record raises, with its path


def _write_majority(request: Request, data: TaskData) -> None:
    record = majority_record(request.preset, data, this_environment())
    if request.force or not path_of_run(request.output, record).exists():
        write_run(request.output, record, force=request.force)


def _keep_cards(output: Path, cards: list[Mechanism]) -> None:
    """Write the cards, one for each name; those of mechanisms that are not in this comparison stay."""
    known = read_mechanisms(output / MECHANISMS_FILE).mechanisms if (output / MECHANISMS_FILE).exists() else ()
    by_name = {card.name: card for card in known}
    for name in {card.name for card in cards}:
        same = [card for card in cards if card.name == name]
        by_name[name] = same[0].model_copy(update={"probes": tuple(probe for card in same for probe in card.probes)})
    everything = [by_name[name] for name in sorted(by_name)]
    write_mechanisms(output, Mechanisms(mechanisms=tuple(everything)))


def _title(plan: RunPlan) -> str:
    return f"{plan.mixer.text}, seed {plan.seed}"
