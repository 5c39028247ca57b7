"""Every kind of task is compared: rows, guess, scores, profile and recommendation follow its objective and metric."""

from dataclasses import replace
from pathlib import Path

import pytest
from stand_ins import InProcess, Recorder
from toy_task import ToyTask, toy_data

from subquad.benchmark import compare as module
from subquad.benchmark import plan as plan_module
from subquad.benchmark import profiling, proving
from subquad.benchmark.compare import compare
from subquad.benchmark.mixers import parse_mixer
from subquad.benchmark.recommendation import recommend
from subquad.benchmark.request import Request
from subquad.records.queries import comparisons
from subquad.records.schema import RunRecord, Status
from subquad.records.store import Records, read_all
from subquad.training.presets import Preset


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Worker", InProcess)
    monkeypatch.setattr(proving, "run_probes", lambda config, dims: [])
    monkeypatch.setattr(profiling, "peak_bytes_in_fresh_process", lambda text, settings, *, causal: {})
    monkeypatch.setattr(plan_module, "load_task", ToyTask)


def compared(kind: str, mixers: str, tiny: Preset, folder: Path, *, stream: bool = False) -> Records:
    preset = replace(tiny, task=kind, training=replace(tiny.training, stream=stream))
    named = tuple(parse_mixer(text) for text in mixers.split(","))
    request = Request(preset, named, (0,), folder, folder, True).with_dense()
    compare(request, toy_data(kind), Recorder())
    return read_all(folder)


def row(records: Records, name: str) -> RunRecord:
    (found,) = [run for run in records.runs if run.mixer_name == name]
    return found


@pytest.mark.parametrize(
    ("kind", "guess", "metric", "causal"),
    [
        ("classification", "majority_class", "accuracy", False),
        ("causal", "unigram", "bits_per_byte", True),
        ("answers", "majority_class", "accuracy", True),
        ("masked", "unigram", "bits_per_byte", False),
        ("seq2seq", "majority_class", "accuracy", True),
    ],
)
def test_every_kind_is_compared(kind: str, guess: str, metric: str, causal: bool, tiny: Preset, tmp_path: Path) -> None:
    records = compared(kind, "linear", tiny, tmp_path)
    assert not records.unreadable
    for name in ("full", "linear"):
        run = row(records, name)
        assert run.status is Status.OK
        assert run.metric is not None
        assert (run.metric.name, run.task.metric, run.task.objective) == (metric, metric, toy_data(kind).objective)
        assert bool(run.metric.by_position) == (kind in ("causal", "answers"))
        assert (run.parameters > 0, run.model["causal"], run.carries_state) == (True, causal, None)
        assert run.cost is not None
        assert run.saved_bytes
    assert row(records, guess).is_guess
    assert {profile.causal for profile in records.profiles} == {causal}
    (comparison,) = comparisons(records)
    assert comparison.guess_score == toy_data(kind).guess().test
    assert all(entry.speed is None or entry.profile is not None for entry in comparison.entries)
    answer = recommend(*comparisons(records))
    assert comparison.kind.unit in answer.sentences[0]


@pytest.mark.parametrize(("kind", "mixer"), [("causal", "linformer"), ("masked", "ngram"), ("seq2seq", "linformer")])
def test_a_mechanism_without_the_form_has_a_row_with_the_reason(
    kind: str, mixer: str, tiny: Preset, tmp_path: Path
) -> None:
    run = row(compared(kind, mixer, tiny, tmp_path), mixer)
    assert run.status is Status.NOT_APPLICABLE
    assert mixer in run.message
    assert run.metric is None


def test_the_record_says_who_carries_its_state_through_a_stream(tiny: Preset, tmp_path: Path) -> None:
    records = compared("stream", "linear", tiny, tmp_path, stream=True)
    assert row(records, "full").carries_state is False
    assert row(records, "linear").carries_state is True
    assert row(records, "unigram").carries_state is None
