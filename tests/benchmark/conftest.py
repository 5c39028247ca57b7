"""A tiny preset and its data, the worker without a process, and a plan for a mechanism of a user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from stand_ins import OWN, InProcess, MakePlan, Recorder

from subquad.benchmark.mixers import parse_mixer
from subquad.benchmark.plan import RunPlan
from subquad.benchmark.request import Request
from subquad.benchmark.worker import Worker
from subquad.tasks.kinds import ClassificationData
from subquad.tasks.listops import ListopsTask
from subquad.training.presets import Preset, load_preset


@pytest.fixture
def worker() -> Worker:
    return InProcess()


@pytest.fixture
def observer() -> Recorder:
    return Recorder()


@pytest.fixture(scope="session")
def tiny() -> Preset:
    return load_preset("listops", str(Path(__file__).parents[1] / "presets" / "tiny.toml"))


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("listops")


@pytest.fixture(scope="session")
def tiny_data(tiny: Preset, data_directory: Path) -> ClassificationData:
    return ListopsTask().prepare(data_directory, tiny.data)


@pytest.fixture
def request_of(tiny: Preset, data_directory: Path, tmp_path: Path) -> Callable[..., Request]:
    """A request for dense attention and these mixers, of the user's own where a name begins with a capital."""

    def make(*mixers: str, seeds: tuple[int, ...] = (0,), force: bool = False, preset: Preset = tiny) -> Request:
        named = tuple(parse_mixer(f"{OWN}:{text}" if text[0].isupper() else text) for text in mixers)
        return Request(preset, named, seeds, tmp_path / "results", data_directory, True, force).with_dense()

    return make


@pytest.fixture
def plan(tiny: Preset, tiny_data: ClassificationData, data_directory: Path, tmp_path: Path) -> MakePlan:
    """A run of a mixer, of the user's own where its name begins with a capital."""

    def make(text: str, preset: Preset = tiny, seed: int = 0) -> RunPlan:
        named = f"{OWN}:{text}" if text[0].isupper() else text
        mixer, checkpoints = parse_mixer(named), tmp_path / "checkpoints"
        return RunPlan(preset, tiny_data.objective, mixer, seed, data_directory, True, checkpoints)

    return make
