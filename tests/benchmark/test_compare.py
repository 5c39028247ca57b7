"""A comparison writes every record once, whatever the mechanisms do, and continues where it was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from stand_ins import OWN, InProcess, Recorder

from subquad.benchmark import compare as module
from subquad.benchmark import profiling, proving, runs
from subquad.benchmark.compare import compare, plan_comparison
from subquad.benchmark.mechanism_card import card_without_pictures
from subquad.benchmark.mixers import parse_mixer
from subquad.benchmark.probes import run_probes
from subquad.benchmark.request import Request
from subquad.records.schema import RunRecord, Status
from subquad.records.store import Records, read_all, read_mechanisms
from subquad.tasks.kinds import ClassificationData
from subquad.training.presets import Preset

Compare = Callable[..., Records]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker process, and no proofs: they have their own tests, and take most of the time."""
    monkeypatch.setattr(module, "Worker", InProcess)
    monkeypatch.setattr(proving, "run_probes", lambda config, dims: [])
    monkeypatch.setattr(profiling, "peak_bytes_in_fresh_process", lambda text, settings, *, causal: {})


@pytest.fixture
def run(request_of: Callable[..., Request], tiny_data: ClassificationData, observer: Recorder) -> Compare:
    def make(*mixers: str, **options: object) -> Records:
        request = request_of(*mixers, **options)
        compare(request, tiny_data, observer)
        return read_all(request.output)

    return make


def row(records: Records, name: str, seed: int = 0) -> RunRecord:
    (found,) = [run for run in records.runs if run.mixer_name == name and run.seed == seed]
    return found


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("seed-*.json"))}


def trained(observer: Recorder) -> list[str]:
    return [what.removeprefix("train ") for what in observer.begun if what.startswith("train ")]


def test_dense_attention_and_the_majority_class_are_always_rows(run: Compare, tmp_path: Path) -> None:
    records = run("linear")
    assert sorted(record.mixer_name for record in records.runs) == ["full", "linear", "majority_class"]
    assert {record.status for record in records.runs} == {Status.OK}
    assert sorted(record.mixer_name for record in records.profiles) == ["full", "linear"]
    assert [card.name for card in read_mechanisms(tmp_path / "results" / "mechanisms.json").mechanisms] == [
        "full",
        "linear",
    ]
    assert not list((tmp_path / "results").rglob("checkpoint-*"))
    assert not records.unreadable


def test_every_mechanism_has_a_run_before_any_has_two(run: Compare, observer: Recorder) -> None:
    run("linear", seeds=(3, 4))
    assert trained(observer) == ["full, seed 3", "linear, seed 3", "full, seed 4", "linear, seed 4"]


def test_what_is_recorded_is_passed_over_and_force_measures_it_again(
    run: Compare, observer: Recorder, tmp_path: Path
) -> None:
    run()
    before = times(tmp_path)
    observer.begun.clear()
    run("linear")
    assert trained(observer) == ["linear, seed 0"]
    assert "prove full" not in observer.begun
    assert "full, seed 0: recorded already" in observer.said
    assert {path: time for path, time in times(tmp_path).items() if path in before} == before
    observer.begun.clear()
    run(force=True)
    assert trained(observer) == ["full, seed 0"]
    assert all(times(tmp_path)[path] > time for path, time in before.items())


class StoppedError(BaseException):
    """Passes through everything, as an interrupt does."""


def test_an_interrupted_comparison_keeps_what_it_finished_and_continues(
    run: Compare, observer: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = runs.execute

    def stopping(plan: object, *arguments: object) -> RunRecord:
        if "linear" in str(plan):
            raise StoppedError
        return original(plan, *arguments)  # pyright: ignore[reportArgumentType] - handed on as they came

    monkeypatch.setattr(runs, "execute", stopping)
    with pytest.raises(StoppedError):
        run("linear", "performer")
    assert sorted(record.mixer_name for record in read_all(tmp_path / "results").runs) == ["full", "majority_class"]
    monkeypatch.setattr(runs, "execute", original)
    observer.begun.clear()
    records = run("linear", "performer")
    assert trained(observer) == ["linear, seed 0", "performer, seed 0"]
    assert len(records.runs) == 4
    assert len(records.profiles) == 3


def test_a_failed_run_is_tried_again_and_other_ends_are_not(
    run: Compare, observer: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    mechanisms = ("RaisesConfig", "NanConfig", "HostMemoryConfig", "ShortConfig")
    records = run(*mechanisms)
    assert row(records, "raises").status is Status.FAILED
    assert row(records, "nan").status is Status.DIVERGED
    assert row(records, "host_memory").status is Status.OUT_OF_MEMORY
    short = row(records, "short")
    assert (short.status, short.message) == (Status.NOT_APPLICABLE, "short: at most 3 tokens")
    assert "short" not in [profile.mixer_name for profile in records.profiles]
    assert row(records, "full").status is Status.OK
    observer.begun.clear()
    run(*mechanisms)
    assert trained(observer) == [f"{OWN}:RaisesConfig, seed 0"]


def test_a_mechanism_that_fails_to_build_is_a_failed_row(run: Compare) -> None:
    broken = row(run("BrokenConfig"), "broken")
    assert (broken.status, broken.message) == (Status.FAILED, "KeyError: 'width'")
    assert broken.metric is None


@pytest.mark.parametrize(
    ("mechanism", "name", "probe"),
    [("LeakConfig", "leak", "no future leak (causal)"), ("PaddingConfig", "padding", "padded against unpadded")],
)
def test_a_mechanism_with_a_red_probe_has_a_row_with_the_reason_and_no_figures(
    run: Compare, monkeypatch: pytest.MonkeyPatch, mechanism: str, name: str, probe: str
) -> None:
    def prove_our_own(config: object, dims: object) -> object:
        return run_probes(config, dims) if type(config).__name__ == mechanism else []  # pyright: ignore[reportArgumentType] - as they came

    monkeypatch.setattr(proving, "run_probes", prove_our_own)
    records = run(mechanism, "linear")
    broken = row(records, name)
    assert broken.status is Status.FAILED
    assert broken.message.startswith("not trained, since proofs failed: ")
    assert probe in broken.message
    assert broken.metric is None
    assert any(not outcome.passed for outcome in broken.probes)
    assert all(outcome.seconds for outcome in broken.probes)
    assert name not in [profile.mixer_name for profile in records.profiles]
    assert row(records, "linear").status is Status.OK


def test_a_sound_mechanism_of_the_users_own_is_compared(run: Compare) -> None:
    records = run("SoundConfig:scale=2.0", "CausalConfig")
    sound, causal = row(records, "sound"), row(records, "causal")
    assert sound.mixer == {"name": "sound", "scale": 2.0}
    assert sound.metric is not None
    assert sound.parameters == row(records, "full").parameters
    assert (causal.model["causal"], causal.model["pooling"]) == (True, "mean")
    assert [profile.causal for profile in records.profiles if profile.mixer_name == "causal"] == [True]


def test_a_mechanism_that_fits_no_profile_is_trained_all_the_same(
    run: Compare, observer: Recorder, tiny: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(config: object, settings: object, *, causal: bool) -> None:
        if type(config).__name__ == "LinearConfig":
            raise ValueError("too short")

    monkeypatch.setattr(module, "profile_dims", refusing)
    records = run("linear")
    assert row(records, "linear").status is Status.OK
    assert [profile.mixer_name for profile in records.profiles] == ["full"]
    assert "linear: no profile: too short" in observer.said


def test_a_damaged_record_is_named(run: Compare, tmp_path: Path) -> None:
    run()
    (path,) = (path for path in (tmp_path / "results").rglob("seed-0.json") if "full-" in str(path))
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"seed-0.json is corrupted or truncated.*Delete it"):
        run()


def test_planned_runs_know_their_size_and_whether_they_are_done(
    run: Compare, request_of: Callable[..., Request], tiny_data: ClassificationData
) -> None:
    run()
    done, due, refused = plan_comparison(request_of("linear", "ShortConfig"), tiny_data)
    assert (done.done, due.done, refused.done) == (True, False, False)
    assert done.training_flops > 0
    assert refused.training_flops == 0
    assert refused.sketch.obstacle == "short: at most 3 tokens"


@pytest.mark.slow
def test_a_mechanism_that_kills_its_process_harms_no_other(
    run: Compare, monkeypatch: pytest.MonkeyPatch, observer: Recorder
) -> None:
    from subquad.benchmark.worker import Worker

    monkeypatch.setattr(module, "Worker", Worker)
    monkeypatch.setattr(runs, "prove", lambda mixer, worker, observer: card_without_pictures(mixer.config, ()))
    records = run("KillsConfig", "linear")
    killed = row(records, "kills")
    assert killed.status is Status.OUT_OF_MEMORY
    assert killed.message == "the process was killed by signal 9; the system does so when memory runs out"
    assert row(records, "linear").status is Status.OK
    profiles = {profile.mixer_name: profile for profile in records.profiles}
    assert (profiles["kills"].status, profiles["linear"].status) == (Status.FAILED, Status.OK)


@pytest.mark.slow
def test_a_mechanism_that_kills_its_process_in_the_proofs_has_a_red_probe(observer: Recorder) -> None:
    from subquad.benchmark.worker import Worker

    mixer = parse_mixer(f"{OWN}:KillsInProofsConfig")
    with Worker([mixer.text]) as worker:
        card = proving.prove(mixer, worker, observer)
    (probe,) = card.red_probes
    assert (probe.name, probe.detail) == ("survives the proofs", "the process was killed by signal 9")
    assert observer.ended == [("0 of 1 proofs hold", True)]
