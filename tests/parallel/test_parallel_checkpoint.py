"""Checkpoints: written by any grid of processes, read by any other, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_on
from small_runs import loop_on, settings, whole_parameters
from torch import Tensor

from subquad.models import SubquadForCausalLM
from subquad.parallel import checkpoint as checkpoints
from subquad.parallel.checkpoint import (
    CheckpointError,
    check_agreement,
    last_checkpoint,
    load_checkpoint,
    read_state,
    remove_older,
)
from subquad.parallel.grid import Grid
from subquad.parallel.train import build_model


def trained_and_saved(grid: Grid, output: str) -> dict[str, Tensor]:
    """Parameters after three steps, with a checkpoint after two."""
    loop = loop_on(grid, settings(output))
    for step in range(2):
        loop.step(step)
    loop.save(2)
    loop.step(2)
    return whole_parameters(loop.model)


def gone_on(grid: Grid, output: str) -> dict[str, Tensor]:
    """Parameters after the third step, the first two read from the checkpoint."""
    found = last_checkpoint(Path(output))
    assert found is not None
    loop = loop_on(grid, settings(output, seed=0), str(found))
    loop.step(read_state(found)["step"])
    return whole_parameters(loop.model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The folder of a run on 2 x 2 processes with a checkpoint after two steps, and the parameters after three."""
    output = tmp_path_factory.mktemp("run")
    return output, run_on(4, trained_and_saved, Grid(2, 2), str(output))[0]


@pytest.mark.parametrize("grid", [Grid(1), Grid(2), Grid(1, 2), Grid(2, 2), Grid(4)], ids=str)
def test_what_four_processes_wrote_goes_on_on_others(grid: Grid, saved: tuple[Path, dict[str, Tensor]]) -> None:
    output, expected = saved
    for process in run_on(grid.processes, gone_on, grid, str(output)):
        torch.testing.assert_close(process, expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_is_a_model_of_hugging_face(saved: tuple[Path, dict[str, Tensor]]) -> None:
    found = last_checkpoint(saved[0])
    assert found is not None
    assert json.loads((found / "config.json").read_text())["architectures"] == ["SubquadForCausalLM"]
    model, plain = SubquadForCausalLM.from_pretrained(found).eval(), build_model(settings())
    load_checkpoint(found, plain)
    ids = torch.randint(1, 257, (2, 12))
    assert torch.equal(model(ids).logits, plain.eval()(ids).logits)


def test_it_holds_everything_once_and_no_pickle(saved: tuple[Path, dict[str, Tensor]]) -> None:
    found = last_checkpoint(saved[0])
    assert found is not None
    files = {"model.safetensors", "optimizer.safetensors", "config.json", "training.json"}
    assert {path.name for path in found.iterdir()} >= files
    assert {path.suffix for path in found.iterdir()} == {".safetensors", ".json"}
    assert read_state(found)["settings"] == settings().fixed()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "training.json"])
def test_a_damaged_file_is_named(name: str, saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    found = last_checkpoint(saved[0])
    assert found is not None
    for path in found.iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[: len(content) // 2] if path.name == name else content)
    model = build_model(settings())
    with pytest.raises(CheckpointError, match=rf"{name}: can't be read .*delete the folder"):
        load_checkpoint(tmp_path, model, torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 32}, r"shape \(.*\), but the model's has \(.*\); build the model with the sizes"),
        ({"layers": 3}, r"is of another model: missing \['model.blocks.2.*'\], not in the model \[\]"),
        ({"feedforward": "mlp"}, r"not in the model \['model.blocks.1.feedforward.experts"),
    ],
)
def test_another_model_is_refused(changes: dict[str, Any], message: str, saved: tuple[Path, dict[str, Tensor]]) -> None:
    found = last_checkpoint(saved[0])
    assert found is not None
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(found, build_model(settings(**changes)))


def fails_to_save(output: str) -> str:
    def broken(*_: Any) -> None:
        raise OSError("the disk is full")

    loop = loop_on(Grid(2), settings(output))
    loop.save(1)
    checkpoints.sync = broken
    try:
        loop.save(2)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_failed_write_is_told_by_all_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    first, second = run_on(2, fails_to_save, str(tmp_path))
    assert first.endswith("step-00000002: the disk is full")
    assert second.endswith("step-00000002: see the first process")
    assert last_checkpoint(tmp_path) == tmp_path / "step-00000001"


def test_older_ones_and_what_was_interrupted_are_removed(tmp_path: Path) -> None:
    for name in ("step-00000009", "step-00000010", "step-100000000", ".step-00000011", "notes"):
        (tmp_path / name).mkdir()
    remove_older(tmp_path, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000010", "step-100000000", "notes"}
    assert last_checkpoint(tmp_path) == tmp_path / "step-100000000"
    assert last_checkpoint(tmp_path / "notes") is None


def disagree() -> str:
    try:
        check_agreement(10 * torch.distributed.get_rank(), torch.device("cpu"))
    except CheckpointError as error:
        return str(error)
    return "agreed"


def test_processes_that_see_different_checkpoints_stop() -> None:
    for said in run_on(2, disagree):
        assert said.startswith("the processes go on from different steps, 0 to 10")
