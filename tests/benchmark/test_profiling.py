"""Profiles are measured once, told when they can't be, and one mechanism's failure is its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from stand_ins import OWN, InProcess, Recorder

from subquad.benchmark import profiling
from subquad.benchmark.mixers import NamedMixer, parse_mixer
from subquad.benchmark.profiling import find_profiles, profile_mixers
from subquad.benchmark.worker import WorkError
from subquad.records.schema import Status
from subquad.training.presets import ProfileSettings

SETTINGS = ProfileSettings(embed_dim=16, num_heads=2, lengths=(16, 32), rounds=2)

Profile = Callable[..., list[Path]]


@pytest.fixture(autouse=True)
def no_fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "peak_bytes_in_fresh_process", lambda text, settings, *, causal: {16: 7})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """The measurements made: mixers and length."""
    made: list[tuple[list[str], int]] = []
    original = profiling.measure_in_worker

    def recording(texts: list[str], settings: ProfileSettings, length: int, causal: bool, progress: object) -> object:
        made.append((texts, length))
        return original(texts, settings, length, causal, lambda done, total, note: None)

    monkeypatch.setattr(profiling, "measure_in_worker", recording)
    return made


@pytest.fixture
def profile(tmp_path: Path, observer: Recorder) -> Profile:
    def run(*mixers: NamedMixer, lengths: tuple[int, ...] = (16, 32), force: bool = False) -> list[Path]:
        settings = replace(SETTINGS, lengths=lengths)
        return profile_mixers(mixers, settings, tmp_path, InProcess(), observer, force=force)

    return run


FULL, LINEAR = parse_mixer("full"), parse_mixer("linear")


def test_a_profile_has_rising_lengths_positive_times_and_dense_beside_them(profile: Profile, tmp_path: Path) -> None:
    assert len(profile(FULL, LINEAR)) == 2
    records = find_profiles([FULL, LINEAR], SETTINGS, tmp_path)
    for record in records:
        assert record.status is Status.OK
        assert [point.length for point in record.points] == [16, 32]
        for point in record.points:
            timings = (point.forward, point.forward_backward, point.dense_forward, point.dense_forward_backward)
            assert min(timing.median_seconds for timing in timings) > 0
        assert [point.peak_bytes for point in record.points] == [7, None]
    assert "--lengths 16,32 --embed-dim 16" in records[0].command


def test_what_is_recorded_is_not_measured_again(
    profile: Profile, tmp_path: Path, calls: list[tuple[list[str], int]]
) -> None:
    profile(FULL)
    assert profile(FULL, lengths=(16,)) == []
    assert calls == [(["full"], 16), (["full"], 32)]
    profile(FULL, LINEAR)
    assert calls[2:] == [(["linear"], 16), (["linear"], 32)]
    profile(FULL, force=True)
    assert calls[4:] == [(["full"], 16), (["full"], 32)]


def test_other_lengths_are_measured_with_those_that_are_recorded(
    profile: Profile, tmp_path: Path, calls: list[tuple[list[str], int]]
) -> None:
    profile(FULL)
    profile(FULL, lengths=(24, 32))
    (record,) = find_profiles([FULL], SETTINGS, tmp_path)
    assert [point.length for point in record.points] == [16, 24, 32]
    assert "--lengths 16,24,32 " in record.command
    profile(FULL, lengths=(64,), force=True)
    (record,) = find_profiles([FULL], SETTINGS, tmp_path)
    assert [point.length for point in record.points] == [64]


def test_a_failure_is_that_mechanisms_own(profile: Profile, tmp_path: Path) -> None:
    broken = parse_mixer(f"{OWN}:RaisesConfig")
    profile(broken, LINEAR)
    failed, sound = find_profiles([broken, LINEAR], SETTINGS, tmp_path)
    assert (failed.status, sound.status) == (Status.FAILED, Status.OK)
    assert failed.message.startswith("at 16 tokens: ValueError: out of ideas")
    assert len(sound.points) == 2


def test_a_failed_profile_is_tried_again_and_one_that_ended_early_is_kept(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = profiling.measure_in_worker

    def fails_from(limit: int) -> None:
        def failing(texts: list[str], settings: ProfileSettings, length: int, *rest: object) -> object:
            if length >= limit:
                raise WorkError("OutOfMemoryError", "no memory", "")
            return original(texts, settings, length, *rest)  # pyright: ignore[reportArgumentType] - as they came

        monkeypatch.setattr(profiling, "measure_in_worker", failing)

    fails_from(16)
    profile(LINEAR)
    fails_from(32)
    assert len(profile(LINEAR)) == 1
    (record,) = find_profiles([LINEAR], SETTINGS, tmp_path)
    assert (record.status, record.message) == (Status.OK, "at 32 tokens: WorkError: no memory")
    assert [point.length for point in record.points] == [16]
    assert profile(LINEAR) == []


def test_a_damaged_profile_is_named(profile: Profile) -> None:
    (path,) = profile(LINEAR)
    path.write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(ValueError, match=rf"{path.name} is corrupted.*Delete it"):
        profile(LINEAR)


def test_a_profile_has_the_receipts_of_what_was_timed(profile: Profile, tmp_path: Path) -> None:
    pattern = parse_mixer("sparse_transformer")
    profile(pattern, LINEAR)
    of_pattern, of_linear = find_profiles([pattern, LINEAR], SETTINGS, tmp_path)
    assert [(receipt.ran, receipt.count) for receipt in of_pattern.receipts] == [
        ("dense attention in slices of queries", 2),  # a pass without gradients and one with them
        ("dense attention in slices of queries", 2),
    ]
    assert [receipt.reason.split()[0] for receipt in of_pattern.receipts] == ["16", "32"]
    assert of_linear.receipts == ()
