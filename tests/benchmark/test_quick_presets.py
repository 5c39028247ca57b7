"""The quick preset of every task that has examples can be run: there is data, a dense model, and a speed to show."""

from __future__ import annotations

from pathlib import Path

import pytest

from subquad.benchmark.mixers import parse_mixer
from subquad.benchmark.plan import RunPlan, read_data, sketch, task_info
from subquad.records.schema import Status
from subquad.tasks.registry import list_tasks, load_task
from subquad.training.presets import list_presets, load_preset


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


@pytest.mark.parametrize("task", list_tasks())
def test_speed_is_measured_on_both_sides_of_the_length_of_the_task(task: str) -> None:
    for name in list_presets(task):
        preset = load_preset(task, name)
        assert min(preset.profile.lengths) <= preset.data.max_length <= max(preset.profile.lengths), preset.name
