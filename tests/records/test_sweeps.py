"""The record of a sweep: written, found again, replaced by the same trials and by no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from subquad.records.schema import RunRecord
from subquad.records.store import path_of_sweep, read_all, write_sweep
from subquad.records.sweeps import SweepRecord, TrialRecord, TunedRecord


def tuned(name: str, **changes: Any) -> TunedRecord:
    trials = tuple(
        TrialRecord(varied={"steps": steps}, mixer={"name": name}, validation=0.1 * steps, status="ok", reason="")
        for steps in (1, 2)
    )
    fields = {"mechanism": name, "trials": trials, "chosen": 1, "test": 0.2, "test_standard_error": 0.01}
    return TunedRecord(**(fields | changes))


MakeSweep = Callable[..., SweepRecord]


@pytest.fixture
def sweep(make_run: Callable[..., RunRecord]) -> MakeSweep:
    return lambda *names, **changes: a_sweep(names, {"task": make_run().task, **changes})


def a_sweep(names: tuple[str, ...], changes: dict[str, Any]) -> SweepRecord:
    fields: dict[str, Any] = {
        "created": "2026-11-22T08:00:00+00:00",
        "command": "subquad sweep",
        "hardware": "machine",
        "preset_name": "quick",
        "preset": "quick",
        "seeds": (0,),
        "mechanisms": tuple(tuned(name) for name in names),
        "recommendation": ("Use full.",),
        "winner": "full",
    }
    return SweepRecord(**(fields | changes))


def test_a_sweep_is_found_again_and_the_same_trials_replace_it(tmp_path: Path, sweep: MakeSweep) -> None:
    first, again = sweep("full", "local"), sweep("local", "full", created="2026-11-23T08:00:00+00:00")
    assert write_sweep(tmp_path, first) == write_sweep(tmp_path, again)
    assert read_all(tmp_path).sweeps == (again,)
    others = [sweep("full"), sweep("full", "local", seeds=(0, 1)), sweep("full", "local", preset="quick:steps=3")]
    assert len({path_of_sweep(tmp_path, each) for each in (first, *others)}) == 4
    write_sweep(tmp_path, first).write_text("{")
    assert "is corrupted or truncated" in read_all(tmp_path).unreadable[0].reason


@pytest.mark.parametrize("changes", [{"chosen": 2}, {"test": None}])
def test_a_choice_that_is_none_is_refused(changes: dict[str, Any]) -> None:
    assert tuned("full", chosen=None, test=None).chosen is None
    with pytest.raises(ValueError, match="is no trial with a validation score, or has no test score"):
        tuned("full", **changes)
