"""The main job: prove, train and profile every named mechanism under one budget, and write it all down.

Each step writes its record before the next one begins and is passed over when its record is there, which is how an
interrupted comparison continues. Nothing is drawn here: an `Observer` hears what happens.
"""

from __future__ import annotations

from typing import Any

from subquad.benchmark.mixers import NamedMixer
from subquad.benchmark.observer import Observer
from subquad.benchmark.profiler import profile_dims
from subquad.benchmark.profiling import profile_mixers
from subquad.benchmark.request import Request
from subquad.benchmark.runs import PlannedRun, SetUp, mixers_of, plan_runs, prove_and_train
from subquad.benchmark.worker import Worker
from subquad.tasks.base import TaskData
from subquad.training.objectives.registry import OBJECTIVES


def plan_comparison(request: Request, data: TaskData[Any]) -> list[PlannedRun]:
    """The runs of a comparison, seed by seed: every mechanism under the one preset. Raises as `plan_runs`."""
    return plan_runs(request, [SetUp(mixer, request.preset) for mixer in request.mixers], data)


def compare(request: Request, data: TaskData[Any], observer: Observer) -> None:
    """Make every record of the comparison that isn't there yet. Raises as `prove_and_train`."""
    runs = plan_comparison(request, data)
    with Worker(list(mixers_of(runs))) as worker:
        cards = prove_and_train(request, runs, data, worker, observer)
        unsound = {planned.plan.mixer.text for planned in runs if planned.sketch.obstacle}
        unsound |= {text for text, card in cards.items() if card.red_probes}
        sound = [mixer for mixer in request.mixers if mixer.text not in unsound]
        causal = OBJECTIVES[data.objective].causal
        sound = [mixer for mixer in sound if _can_be_profiled(mixer, request, observer, causal=causal)]
        settings, output = request.preset.profile, request.output
        profile_mixers(sound, settings, output, worker, observer, causal=causal, force=request.force)


def _can_be_profiled(mixer: NamedMixer, request: Request, observer: Observer, *, causal: bool) -> bool:
    try:
        profile_dims(mixer.config, request.preset.profile, causal=causal)
    except ValueError as error:
        observer.say(f"{mixer.text}: no profile: {error}")
        return False
    return True
