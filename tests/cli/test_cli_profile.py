"""`profile` measures what is asked, prints figures beside dense attention, and refuses what can't be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Invoke

from subquad.benchmark import profiling
from subquad.benchmark.worker import Progress, Worker, WorkError
from subquad.build import list_mixers

SIZES = ["--embed-dim", "16", "--num-heads", "2", "--rounds", "2"]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(self: Worker, function: Callable[..., Any], *arguments: Any, progress: Progress | None = None) -> Any:
        return function(*arguments, progress or (lambda done, total, note: None))

    monkeypatch.setattr(Worker, "call", call)
    monkeypatch.setattr(profiling, "peak_bytes_in_fresh_process", lambda text, settings, *, causal: {})


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    return [*SIZES, "--output", str(tmp_path / "out")]


def test_the_table_has_a_column_for_each_length(invoke: Invoke, arguments: list[str], tmp_path: Path) -> None:
    ran = invoke("profile", "--mixers", "linear,local:window=9", "--lengths", "32,16", *arguments)
    assert ran.exit_code == 0, ran.err
    heading, first, second = ran.out.splitlines()[:3]
    assert heading.split() == ["forward", "+", "backward", "16", "32", "faster", "from", "kept", "at", "the", "longest"]
    assert first.startswith("linear ")
    assert second.startswith("local:window=9 ")
    assert first.count("x)") == second.count("x)") == 2
    assert (tmp_path / "out" / "report.html").exists()


def test_other_lengths_are_measured_when_they_are_asked_for(invoke: Invoke, arguments: list[str]) -> None:
    for lengths in ("16", "8,16"):
        document = invoke("profile", "--mixers", "linear", "--lengths", lengths, "--json", *arguments).document
        (profile,) = document["profiles"]
        assert [str(point["length"]) for point in profile["points"]] == lengths.split(",")
        assert min(point["dense_forward"]["samples_seconds"][0] for point in profile["points"]) > 0


def test_a_dry_run_measures_nothing(invoke: Invoke, arguments: list[str], tmp_path: Path) -> None:
    document = invoke("profile", "--lengths", "16", "--dry-run", "--json", *arguments).document
    assert document == {"mixers": list_mixers(), "lengths": [16], "rounds": 2}
    assert not (tmp_path / "out").exists()


def test_causal_forms_are_profiled_where_there_is_one(invoke: Invoke, arguments: list[str]) -> None:
    document = invoke("profile", "--lengths", "16", "--causal", "--dry-run", "--json", *arguments).document
    assert document["mixers"] == list_mixers(causal=True)


def test_a_failure_is_told_with_its_reason(
    invoke: Invoke, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(self: Worker, *arguments: object, **keywords: object) -> None:
        raise WorkError("RuntimeError", "out of ideas", "")

    monkeypatch.setattr(Worker, "call", call)
    ran = invoke("profile", "--mixers", "linear", "--lengths", "16", *arguments)
    assert "linear: at 16 tokens: RuntimeError: out of ideas" in ran.err
    assert ran.out.splitlines()[1].split() == ["linear", "-", "never", "here", "-"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--lengths", "many"], "--lengths: expected whole numbers separated by commas, got 'many'"),
        (["--lengths", ""], "--lengths: expected whole numbers separated by commas, got ''"),
        (["--lengths", "0"], "lengths must be positive and increasing, got [0]"),
        (["--rounds", "0"], "invalid value for '--rounds'"),
        (["--embed-dim", "15"], "embed_dim=15 is not divisible by num_heads=2"),
        (["--mixers", "local:window=8"], "7 or 9"),
        (["--mixers", "linformer", "--causal"], "linformer"),
        (["--mixer", "linear"], "unknown option --mixer (did you mean --mixers?)"),
    ],
)
def test_what_can_not_be_measured_says_why(
    invoke: Invoke, arguments: list[str], options: list[str], text: str, tmp_path: Path
) -> None:
    ran = invoke("profile", *arguments, *options)
    assert ran.exit_code == 2
    assert ran.out == ""
    assert text in ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
