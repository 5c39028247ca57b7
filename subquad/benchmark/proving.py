"""The proofs of a comparison: every probe of every form that a mechanism offers, run in the worker, as its card.

Proofs run a user's own code. Whatever that does, even to its process, is an outcome: a failed proof with the reason.
"""

from __future__ import annotations

from subquad.benchmark.mechanism_card import card_without_pictures, mechanism_card
from subquad.benchmark.mixers import NamedMixer, parse_mixer
from subquad.benchmark.observer import Observer
from subquad.benchmark.plan import first_line
from subquad.benchmark.probes import ProbeResult, offered_forms, run_probes
from subquad.benchmark.worker import Progress, Worker, WorkerDiedError, WorkError
from subquad.build import make_dims
from subquad.records.mechanisms import Mechanism
from subquad.records.schema import ProbeRecord

PICTURE_LENGTH = 32
"""Tokens in the picture of who attends whom."""

SURVIVES = "survives the proofs"
"""The proof that a mechanism fails which can't be proved at all."""


def prove(mixer: NamedMixer, worker: Worker, observer: Observer) -> Mechanism:
    """The mechanism's card with the outcomes of its proofs."""
    step = observer.begin(f"prove {mixer.text}")
    try:
        card = worker.call(prove_in_worker, mixer.text, progress=step.progress)
    except WorkError as error:
        card = _unproved(mixer, first_line(error.kind, str(error)))
    except WorkerDiedError as error:
        card = _unproved(mixer, str(error))
    passed = sum(probe.passed for probe in card.probes)
    step.end(f"{passed} of {len(card.probes)} proofs hold", failed=bool(card.red_probes))
    for probe in card.red_probes:
        observer.say(f"{mixer.text}: {probe.name}: {probe.detail}")
    return card


def prove_in_worker(text: str, progress: Progress) -> Mechanism:
    """Every probe of every form, and the pictures; called in the worker process."""
    config = parse_mixer(text).config
    dims = make_dims(embed_dim=16, num_heads=2, max_length=64)
    results: list[tuple[str, ProbeResult]] = []
    forms = offered_forms(config, dims)
    for index, form in enumerate(forms):
        kind = "causal" if form.causal else "cross" if form.cross else "bidirectional"
        progress(index, len(forms), kind)
        results += [(kind, result) for result in run_probes(config, form)]
    return mechanism_card(config, results, length=PICTURE_LENGTH)


def _unproved(mixer: NamedMixer, reason: str) -> Mechanism:
    return card_without_pictures(mixer.config, (ProbeRecord(name=SURVIVES, passed=False, detail=reason),))
