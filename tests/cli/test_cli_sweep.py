"""`sweep` ends with the best trial of each mechanism, a page and a recommendation; a dry run with a plan alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Invoke

from subquad.benchmark import proving
from subquad.benchmark.worker import Progress, Worker, WorkError

TINY = str(Path(__file__).parents[1] / "presets" / "tiny.toml")
NAN = f"{Path(__file__).parents[1] / 'benchmark' / 'own_mechanisms.py'}:NanConfig"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker process, and no proofs: they have their own tests, and take most of the time."""

    def call(self: Worker, function: Callable[..., Any], *arguments: Any, progress: Progress | None = None) -> Any:
        try:
            return function(*arguments, progress or (lambda done, total, note: None))
        except Exception as error:
            raise WorkError(type(error).__name__, str(error), "") from error

    monkeypatch.setattr(Worker, "call", call)
    monkeypatch.setattr(proving, "run_probes", lambda config, dims: [])


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    options = ["--preset", TINY, "--output", str(tmp_path / "out"), "--mixers", "linear"]
    return [*options, "--grid", "learning_rate=1e-3,5e-3", "--grid", "steps=8"]


def test_a_sweep_ends_with_the_best_trials_and_its_page_and_folder_can_be_read_on(
    invoke: Invoke, arguments: list[str], tmp_path: Path
) -> None:
    first = invoke("sweep", *arguments)
    assert first.exit_code == 0, first.err
    for word in ("Tiny ListOps", "2 trials of each mechanism, 1 seed", "full", "linear", "steps=8", "Validation", "➜"):
        assert word in first.out
    assert "✓ train linear, steps=8, learning_rate=0.001, seed 0" in first.err
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Sweep: Tiny ListOps</h2>" in page
    assert f"--preset {TINY} --mixers full,linear --grid learning_rate=1e-3,5e-3 --grid steps=8 --seeds 1" in page
    document = invoke("sweep", *arguments, "--json").document
    assert [each["mechanism"] for each in document["mechanisms"]] == ["full", "linear"]
    assert {"verdict", "sentences"} <= set(document["recommendation"])
    for each in document["mechanisms"]:
        trials = each["trials"]
        assert [trial["settings"] for trial in trials] == [{"learning_rate": rate, "steps": 8} for rate in (1e-3, 5e-3)]
        assert each["best"]["validation"] == max(trial["validation"] for trial in trials)
        assert {trial["status"] for trial in trials} == {"ok"}
    (_,) = (tmp_path / "out").rglob("sweep-*.json")  # the second sweep has replaced that of the first
    for verb in ("recommend", "report"):
        ran = invoke(verb, "--output", str(tmp_path / "out"), "--preset", "tiny:steps=8:learning_rate=0.001")
        assert ran.exit_code == 0, ran.err
        assert "tiny:steps=8:learning_rate=0.001 preset, 1 seed" in ran.out


def test_the_command_of_a_trial_finds_its_record(invoke: Invoke, arguments: list[str], tmp_path: Path) -> None:
    document = invoke("sweep", *arguments, "--json").document
    (command,) = document["mechanisms"][1]["trials"][0]["commands"]
    program, *words = command.split()
    assert program == "subquad"
    ran = invoke(*words, "--output", str(tmp_path / "out"))
    assert "linear, steps=8, learning_rate=0.001, seed 0: recorded already" in ran.err


def test_a_dry_run_shows_every_trial_and_writes_nothing(invoke: Invoke, arguments: list[str], tmp_path: Path) -> None:
    document = invoke("sweep", *arguments, "--seeds", "2", "--dry-run", "--json").document
    planned = [(run["mixer"], run["changed_settings"].get("learning_rate"), run["seed"]) for run in document["runs"]]
    assert planned == [(name, rate, seed) for seed in (0, 1) for rate in (1e-3, None) for name in ("full", "linear")]
    ran = invoke("sweep", *arguments, "--dry-run")
    assert "steps=8 learning_rate=0.001" in ran.out
    assert not list((tmp_path / "out").rglob("seed-*.json"))


def test_failed_trials_are_shown_with_their_reason(invoke: Invoke, tmp_path: Path) -> None:
    options = ["--preset", TINY, "--output", str(tmp_path), "--grid", "steps=8,16", "--mixers", NAN]
    ran = invoke("sweep", *options)
    assert ran.exit_code == 0, ran.err
    for word in ("0 of 2 ok", "nan steps=8: diverged: the training loss became nan", "nan steps=16: diverged: "):
        assert word in ran.out.replace("\n", " ")
