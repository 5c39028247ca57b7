"""A tiny preset and its data, for trainings of a fraction of a second."""

from pathlib import Path

import pytest

from subquad.tasks.kinds import ClassificationData
from subquad.tasks.listops import ListopsTask
from subquad.training.presets import Preset, load_preset


@pytest.fixture(scope="session")
def tiny() -> Preset:
    return load_preset("listops", str(Path(__file__).parents[1] / "presets" / "tiny.toml"))


@pytest.fixture(scope="session")
def tiny_data(tiny: Preset, tmp_path_factory: pytest.TempPathFactory) -> ClassificationData:
    return ListopsTask().prepare(tmp_path_factory.mktemp("listops"), tiny.data)
