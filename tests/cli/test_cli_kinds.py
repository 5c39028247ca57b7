"""`run` and `compare` on tasks of every kind: the texts follow objective and metric."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Invoke

from subquad.benchmark import plan, profiling, proving
from subquad.benchmark.worker import Progress, Worker
from subquad.cli import comparison
from subquad.models import SubquadForCausalLM

TINY = str(Path(__file__).parents[1] / "presets" / "tiny.toml")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker process, no proofs, and toy tasks of every kind."""

    def call(self: Worker, function: Callable[..., Any], *arguments: Any, progress: Progress | None = None) -> Any:
        return function(*arguments, progress or (lambda done, total, note: None))

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmark"))
    toy_task = importlib.import_module("toy_task").ToyTask
    monkeypatch.setattr(Worker, "call", call)
    monkeypatch.setattr(proving, "run_probes", lambda config, dims: [])
    monkeypatch.setattr(profiling, "peak_bytes_in_fresh_process", lambda text, settings, *, causal: {})
    monkeypatch.setattr(comparison, "load_task", toy_task)
    monkeypatch.setattr(plan, "load_task", toy_task)


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    return ["--preset", TINY, "--output", str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("kind", "title", "unit", "guess"),
    [
        ("causal", "Test bits per byte", "bits/byte", "unigram"),
        ("masked", "Test bits per byte", "bits/byte", "unigram"),
        ("seq2seq", "Test accuracy", "%", "majority class"),
    ],
)
def test_a_comparison_speaks_of_its_metric(
    kind: str, title: str, unit: str, guess: str, invoke: Invoke, options: list[str]
) -> None:
    ran = invoke("compare", "--task", kind, "--mixers", "linear", *options)
    assert ran.exit_code == 0, ran.err
    for word in (title, unit, guess, "linear", "➜"):
        assert word in ran.out
    assert f" {unit}" in next(line for line in ran.err.splitlines() if line.startswith("✓ train linear"))
    assert ("tokens of context, in bits/byte" in " ".join(ran.out.split())) == (kind == "causal")
    (found,) = invoke("report", "--json", "--output", options[-1]).document["comparisons"]
    assert found["metric"]["higher_is_better"] == (unit == "%")
    rows = {row["mechanism"]: row for row in found["rows"]}
    assert bool(rows["full"]["by_position"]) == (kind == "causal")


def test_a_dry_run_says_who_can_not_do_it(invoke: Invoke, options: list[str]) -> None:
    document = invoke("compare", "--task", "causal", "--mixers", "linformer", "--dry-run", "--json", *options).document
    states = {run["mixer"]: run["state"] for run in document["runs"]}
    assert states["full"] == "to run"
    assert states["linformer"].startswith("not applicable: linformer")
    assert all(run["expected_minutes"] >= 0 for run in document["runs"])


def test_the_best_model_is_saved_whole_and_can_be_loaded(invoke: Invoke, options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "models" / "mine"
    ran = invoke("run", "--task", "causal", "--mixer", "linear", "--save-model", str(folder), *options)
    assert ran.exit_code == 0, ran.err
    assert f"model: {folder}" in ran.out
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]
    (layer,) = SubquadForCausalLM.from_pretrained(folder).config.layer_mixers()
    assert layer.name == "linear"
    again = ["run", "--task", "causal", "--mixer", "linear", *options, "--save-model"]
    assert f"{folder} holds something already; name a new folder" in invoke(*again, str(folder)).err
    ran = invoke(*again, str(tmp_path / "other"))
    assert ran.exit_code == 2
    assert "this run is recorded already and its model was not kept; add --force" in ran.err
    assert invoke(*again, str(tmp_path / "other"), "--force").exit_code == 0
    assert (tmp_path / "other" / "model.safetensors").exists()
