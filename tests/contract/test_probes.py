"""Every probe that concerns a mechanism holds, for every mechanism of the registry in every form."""

from __future__ import annotations

from dataclasses import fields

import pytest
from cases import subjects

from subquad.benchmark.probe_subject import Subject
from subquad.benchmark.probes import PROBES, Probe, run_probes
from subquad.build import list_mixers, make_dims, mixer_config

CASES = [
    pytest.param(subject, probe, id=f"{label}-{probe.name}")
    for label, subject in subjects().items()
    for probe in PROBES
    if probe.concerns(subject)
]


@pytest.mark.parametrize(("subject", "probe"), CASES)
def test_the_claim_of_the_probe_holds(subject: Subject, probe: Probe) -> None:
    finding = probe.prove(subject)
    assert finding.passed, finding.detail


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_claims_hold_with_other_numbers(seed: int) -> None:
    for label, subject in subjects().items():
        results = run_probes(subject.asked, subject.dims, seed=seed)
        red = [f"{label}: {result.name}: {result.detail}" for result in results if not result.passed]
        assert not red


def test_results_are_plain_sentences_with_a_time() -> None:
    for name in list_mixers(bidirectional=True):
        for result in run_probes(mixer_config(name), make_dims(embed_dim=16, num_heads=4)):
            assert {field.name for field in fields(result)} == {"name", "passed", "detail", "seconds"}
            assert result.detail
            assert "\n" not in result.detail
            assert result.seconds >= 0
