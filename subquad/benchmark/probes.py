"""The proofs, once: run by the contract tests, and by `subquad compare`, `run` and `sweep` before they train.

Each probe is one claim of the contract, tested on a small sibling of the mechanism (`probe_subject.miniature`) in
float64 unless dtypes are the claim. Which probes run follows from the traits and the form asked for; a trait that is
False is proved False where that means something. A probe that raises has failed, with the error as its detail.

A green list is no proof of fidelity to a paper: equality with the definition is each mechanism's own test.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from subquad.benchmark import probe_causality, probe_masks, probe_numerics, probe_softmax
from subquad.benchmark.probe_subject import Finding, Subject, small_subject
from subquad.interface import Dims, MixerConfig


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """The outcome of one probe.

    Attributes:
        name: what was probed.
        passed: whether the claim holds.
        detail: a plain sentence with the measured figure and the tolerance, or the error.
        seconds: wall-clock time it took.
    """

    name: str
    passed: bool
    detail: str
    seconds: float


@dataclass(frozen=True)
class Probe:
    """A claim: its name, the mechanisms and forms it concerns, and its proof."""

    name: str
    concerns: Callable[[Subject], bool]
    prove: Callable[[Subject], Finding]


def _always(subject: Subject) -> bool:
    return True


def _causal(subject: Subject) -> bool:
    return subject.dims.causal


def _padding(subject: Subject) -> bool:
    return subject.config.traits.padding


def _segments(subject: Subject) -> bool:
    return subject.config.traits.segments


def _state(subject: Subject) -> bool:
    return subject.config.traits.state and (subject.dims.causal or subject.dims.cross)


def _causal_state(subject: Subject) -> bool:
    return subject.config.traits.state and subject.dims.causal


def _self_attention(subject: Subject) -> bool:
    return not subject.dims.cross


PROBES = (
    Probe("no future leak", _causal, probe_causality.future),
    Probe("prefix", _causal, probe_causality.prefix),
    Probe("stream in pieces", _state, probe_causality.partition),
    Probe("rows of a state", _state, probe_causality.rows),
    Probe("state not modified", _state, probe_causality.state_kept),
    Probe("size of the state", _causal_state, probe_causality.state_size),
    Probe("content of padding", _padding, probe_masks.padding_content),
    Probe("output at padding", _padding, probe_masks.padding_output),
    Probe("nothing but padding", _padding, probe_masks.all_padding),
    Probe("padded against unpadded", _padding, probe_masks.padding_sides),
    Probe("batch independence", _always, probe_masks.batch),
    Probe("packed documents", _segments, probe_masks.documents),
    Probe("global tokens", _self_attention, probe_masks.global_tokens),
    Probe("gradients", _always, probe_numerics.gradient),
    Probe("extreme inputs", _always, probe_numerics.extremes),
    Probe("dtypes", _always, probe_numerics.dtypes),
    Probe("determinism", _always, probe_numerics.determinism),
    Probe("longest input", _always, probe_numerics.longest),
    Probe("auxiliary loss", _always, probe_numerics.auxiliary_loss),
    Probe("refusals", _always, probe_numerics.refusals),
    Probe("parameter count", _always, probe_numerics.parameter_count),
    Probe("approximates softmax", _always, probe_softmax.approximates_softmax),
)


def offered_forms(config: MixerConfig, dims: Dims) -> list[Dims]:
    """The dims in each form that the mechanism offers: bidirectional, causal, cross, in this order."""
    traits = config.traits
    forms = ((traits.bidirectional, False, False), (traits.causal, True, False), (traits.cross, False, True))
    return [replace(dims, causal=causal, cross=cross) for offered, causal, cross in forms if offered]


def run_probes(config: MixerConfig, dims: Dims, *, seed: int = 0) -> list[ProbeResult]:
    """Run every probe that concerns this mechanism in this form; takes a few seconds.

    Args:
        config: the mechanism, registered or not; its sizes are shrunk.
        dims: the form (`causal`, `cross`) and circumstances to prove; widths and `max_length` are made small.
        seed: of parameters and inputs.
    """
    subject = small_subject(config, dims, seed=seed)
    built = _run(Probe("builds and runs", _always, _builds), subject)
    if not built.passed:
        return [built]
    return [built, *(_run(probe, subject) for probe in PROBES if probe.concerns(subject))]


def _run(probe: Probe, subject: Subject) -> ProbeResult:
    start = time.perf_counter()
    try:
        finding = probe.prove(subject)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        finding = Finding(False, f"{type(error).__name__}: {lines[0]}")
    return ProbeResult(
        name=probe.name, passed=finding.passed, detail=finding.detail, seconds=time.perf_counter() - start
    )


def _builds(subject: Subject) -> Finding:
    mixer, inputs = subject.mixer(), subject.inputs()
    y = mixer(*inputs).y
    expected = tuple(inputs.x.shape)
    return Finding(tuple(y.shape) == expected, f"x of shape {expected} gives y of shape {tuple(y.shape)}")
