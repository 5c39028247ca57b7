"""Runs are planned seed by seed, told apart by their training settings, and trained without a profile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from stand_ins import OWN, InProcess, Recorder

from subquad.benchmark import proving, runs
from subquad.benchmark.mixers import parse_mixer
from subquad.benchmark.request import Request
from subquad.benchmark.runs import SetUp, plan_runs, train
from subquad.records.schema import Status
from subquad.records.store import read_all, read_run
from subquad.tasks.kinds import ClassificationData
from subquad.training.presets import Preset

LINEAR = parse_mixer("linear")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "Worker", InProcess)
    monkeypatch.setattr(proving, "run_probes", lambda config, dims: [])


def test_a_preset_that_even_dense_attention_refuses_is_an_error(
    request_of: Callable[..., Request], tiny: Preset, tiny_data: ClassificationData
) -> None:
    odd = replace(tiny, model=replace(tiny.model, hidden_size=6, num_attention_heads=2, positions="rotary"))
    with pytest.raises(ValueError, match=r"tiny\.toml: even dense attention can't be built"):
        plan_runs(request_of(preset=odd), [SetUp(parse_mixer("full"), odd)], tiny_data)


def test_one_run_is_trained_without_a_profile(
    request_of: Callable[..., Request], tiny_data: ClassificationData, observer: Recorder
) -> None:
    request = request_of()
    planned = plan_runs(request, [SetUp(LINEAR, request.preset)], tiny_data)
    (path,) = train(request, planned, tiny_data, observer)
    assert path.exists()
    assert not read_all(request.output).profiles


def test_every_set_up_has_a_run_before_any_has_two(
    request_of: Callable[..., Request], tiny: Preset, tiny_data: ClassificationData
) -> None:
    slow = tiny.with_training({"learning_rate": 1e-4})
    planned = plan_runs(request_of(seeds=(3, 4)), [SetUp(LINEAR, tiny), SetUp(LINEAR, slow)], tiny_data)
    assert [(run.plan.preset, run.plan.seed) for run in planned] == [(tiny, 3), (slow, 3), (tiny, 4), (slow, 4)]


def test_runs_under_other_training_settings_are_other_records_which_name_them(
    request_of: Callable[..., Request], tiny: Preset, tiny_data: ClassificationData, observer: Recorder
) -> None:
    request, slow = request_of(), tiny.with_training({"learning_rate": 1e-4})
    planned = plan_runs(request, [SetUp(LINEAR, tiny), SetUp(LINEAR, slow)], tiny_data)
    records = [read_run(path) for path in train(request, planned, tiny_data, observer)]
    assert [record.changed_settings for record in records] == [{}, {"learning_rate": 1e-4}]
    assert records[0].preset != records[1].preset
    assert f"--preset {tiny.source}:learning_rate=0.0001 --mixer linear" in records[1].command
    assert observer.begun == ["prove linear", "train linear, seed 0", "train linear, learning_rate=0.0001, seed 0"]
    again = plan_runs(request, [SetUp(LINEAR, slow), SetUp(LINEAR, tiny)], tiny_data)
    assert [run.done for run in again] == [True, True]
    assert len(read_all(request.output).runs) == 3  # and the guess


def test_what_can_not_be_built_is_said_before_any_proof(
    request_of: Callable[..., Request], tiny_data: ClassificationData, observer: Recorder
) -> None:
    request = request_of()
    refused = parse_mixer(f"{OWN}:ShortConfig")
    alone = plan_runs(request, [SetUp(refused, request.preset)], tiny_data)
    (path,) = train(request, alone, tiny_data, observer)
    assert read_run(path).status is Status.NOT_APPLICABLE
    assert observer.begun == []
    said = f"{refused.text}, seed 0: not applicable: short: at most 3 tokens"
    assert observer.said == [said]
    beside = plan_runs(request, [SetUp(LINEAR, request.preset), SetUp(refused, request.preset)], tiny_data)
    train(request, beside, tiny_data, observer)
    assert observer.said[:2] == [said, said]
