"""A tiny preset and its data, for trainings of a fraction of a second."""

from pathlib import Path

import pytest

from subquad.tasks.base import TaskData
from subquad.tasks.registry import load_task
from subquad.training.presets import Preset, load_preset


@pytest.fixture(scope="session")
def tiny() -> Preset:
    return load_preset("listops", str(Path(__file__).parents[1] / "presets" / "tiny.toml"))


@pytest.fixture(scope="session")
def tiny_data(tiny: Preset, tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    return load_task("listops").prepare(tmp_path_factory.mktemp("listops"), tiny.data)
