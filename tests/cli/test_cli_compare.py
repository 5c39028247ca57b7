"""`compare` and `run` end with records, a page and a recommendation; a dry run ends with a plan alone."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Invoke

from subquad.benchmark import profiling, proving
from subquad.benchmark.worker import Progress, Worker
from subquad.cli import comparison

TINY = str(Path(__file__).parents[1] / "presets" / "tiny.toml")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker process, and no proofs: they have their own tests, and take most of the time."""

    def call(self: Worker, function: Callable[..., Any], *arguments: Any, progress: Progress | None = None) -> Any:
        return function(*arguments, progress or (lambda done, total, note: None))

    monkeypatch.setattr(Worker, "call", call)
    monkeypatch.setattr(proving, "run_probes", lambda config, dims: [])
    monkeypatch.setattr(profiling, "peak_bytes_in_fresh_process", lambda text, settings, *, causal: {})


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    return ["--preset", TINY, "--output", str(tmp_path / "out")]


def records(folder: Path) -> list[str]:
    return sorted(path.parent.name.rpartition("-")[0] for path in folder.rglob("seed-*.json"))


def test_a_comparison_ends_with_table_page_and_recommendation(
    invoke: Invoke, arguments: list[str], tmp_path: Path
) -> None:
    ran = invoke("compare", "--mixers", "linear,local:window=9", *arguments)
    assert ran.exit_code == 0, ran.err
    for word in ("Tiny ListOps", "full", "linear", "local", "Test accuracy", "➜", "report.html"):
        assert word in ran.out
    assert "train linear, seed 0 ..." in ran.err
    assert "✓ train local:window=9, seed 0" in ran.err
    assert records(tmp_path / "out") == ["full", "linear", "local", "majority_class"]
    assert (tmp_path / "out" / "report.html").exists()


def test_the_document_is_one_and_a_second_call_only_reads(invoke: Invoke, arguments: list[str], tmp_path: Path) -> None:
    first = invoke("compare", "--mixers", "linear", "--json", *arguments)
    rows = {row["mechanism"]: row for row in first.document["comparisons"][0]["rows"]}
    assert len(rows) == 3
    assert rows["linear"]["status"] == "ok"
    assert first.document["comparisons"][0]["preset"].startswith("tiny-")
    second = invoke("compare", "--mixers", "linear", "--json", *arguments)
    assert second.document == first.document
    assert "linear, seed 0: recorded already" in second.err
    assert "train " not in second.err


def test_what_else_lies_in_the_folder_is_left_to_the_page(invoke: Invoke, arguments: list[str]) -> None:
    first = invoke("compare", "--mixers", "linear", "--json", *arguments)
    _, preset, *output = arguments
    second = invoke("compare", "--mixers", "linear", "--json", "--preset", f"{preset}:learning_rate=4e-3", *output)
    (own,), (other,) = first.document["comparisons"], second.document["comparisons"]
    assert own["preset"] != other["preset"]
    assert len(invoke("report", "--json", *output).document["comparisons"]) == 2


def test_a_dry_run_trains_nothing_and_writes_no_record(invoke: Invoke, arguments: list[str], tmp_path: Path) -> None:
    options = ["compare", "--mixers", "linear", "--seeds", "2", "--seed", "5", "--dry-run", *arguments]
    document = invoke(*options, "--json").document
    planned = [(run["mixer"], run["seed"], run["state"]) for run in document["runs"]]
    assert planned == [(name, seed, "to run") for seed in (5, 6) for name in ("full", "linear")]
    assert all(run["parameters"] > 0 for run in document["runs"])
    assert document["expected_minutes"] >= 0
    ran = invoke(*options)
    assert re.search(r"^About [\d.]+ m?s of training on this machine; proofs", ran.out, re.MULTILINE)
    assert records(tmp_path / "out") == []
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_dry_run_of_weeks_says_days(invoke: Invoke, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "matmul_flops_per_second", lambda: 40.0)
    ran = invoke("compare", "--mixers", "linear", "--dry-run", *arguments)
    assert re.search(r"^About [\d,]+ days \d+ h of training on this machine; proofs", ran.out, re.MULTILINE)
    assert re.search(r"linear .* [\d,]+ days \d+ h +to run", ran.out)


def test_a_dry_run_knows_what_is_recorded(invoke: Invoke, arguments: list[str]) -> None:
    invoke("run", "--mixer", "full", *arguments)
    document = invoke("compare", "--mixers", "linear", "--dry-run", "--json", *arguments).document
    assert [run["state"] for run in document["runs"]] == ["recorded", "to run"]


def test_a_run_names_its_record(invoke: Invoke, arguments: list[str], tmp_path: Path) -> None:
    (path,) = invoke("run", "--mixer", "linear", "--seed", "3", "--json", *arguments).document["records"]
    assert Path(path).name == "seed-3.json"
    assert Path(path).is_file()
    assert f"record: {path}" in invoke("run", "--mixer", "linear", "--seed", "3", *arguments).out


@pytest.mark.slow
def test_a_run_without_a_score_is_no_success(tmp_path: Path) -> None:
    own = Path(__file__).parents[1] / "benchmark" / "own_mechanisms.py"
    command = [sys.executable, "-m", "subquad", "run", "--mixer", f"{own}:NanConfig", "--preset", TINY]
    ran = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "diverged" in ran.stderr
    assert "record: " in ran.stdout


def test_an_edited_preset_is_not_taken_for_what_it_was(invoke: Invoke, tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    text = Path(TINY).read_text()
    paths = set()
    for rate in ("5e-3", "4e-3"):
        preset.write_text(text.replace("5e-3", rate))
        options = ["--preset", str(preset), "--output", str(tmp_path / "out"), "--json"]
        paths |= set(invoke("run", "--mixer", "linear", *options).document["records"])
    assert len(paths) == 2
    assert (tmp_path / "out" / "data" / "listops" / "mine" / "manifest.json").exists()


def test_data_of_the_users_own_is_read_and_named_in_the_command(
    invoke: Invoke, arguments: list[str], tmp_path: Path
) -> None:
    generated = invoke("run", "--mixer", "linear", "--json", *arguments).document["records"]
    own = tmp_path / "out" / "data" / "listops" / "tiny"
    (own / "manifest.json").unlink()
    again = invoke("run", "--mixer", "linear", "--data", str(own), "--json", *arguments).document["records"]
    assert again == generated  # the same examples are the same task, wherever they came from
