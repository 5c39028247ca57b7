"""Of every task that has examples the quick preset can be run: there is data, and a dense model can be built for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from subquad.benchmark.mixers import parse_mixer
from subquad.benchmark.plan import RunPlan, read_data, sketch, task_info
from subquad.records.schema import Status
from subquad.tasks.registry import list_tasks, load_task
from subquad.training.presets import load_preset


@pytest.mark.parametrize("task", [name for name in list_tasks() if load_task(name).has_examples])
def test_dense_attention_can_be_built_for_every_task(task: str, tmp_path: Path) -> None:
    preset = load_preset(task, "quick")
    data = read_data(preset, tmp_path, generated=True)
    plan = RunPlan(preset, data.objective, parse_mixer("full"), 0, tmp_path, True, tmp_path)
    found = sketch(plan, data)
    assert (found.status, found.obstacle) == (Status.OK, "")
    assert 10_000 < found.parameters < 10_000_000
    assert task_info(data).title
    assert data.guess().asked > 0
