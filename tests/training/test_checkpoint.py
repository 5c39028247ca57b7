import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from subquad.training.checkpoint import (
    DamagedCheckpointError,
    check_checkpoint,
    checkpoint_path,
    checkpoint_step,
    last_complete_checkpoint,
)

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def write_checkpoint(directory: Path, step: int) -> Path:
    checkpoint = checkpoint_path(directory, step)
    checkpoint.mkdir()
    save_file({"weight": torch.arange(8.0)}, checkpoint / FILES[0])
    for name in FILES[1:]:
        torch.save({"weight": torch.arange(8.0)}, checkpoint / name)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoint


def test_the_newest_by_step_is_found_and_other_folders_are_not(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    for step in (9, 10, 100):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-1000").mkdir()
    found = last_complete_checkpoint(tmp_path)
    assert found == checkpoint_path(tmp_path, 100)
    assert checkpoint_step(checkpoint_path(tmp_path, 100)) == 100


def test_a_whole_checkpoint_passes(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1)
    check_checkpoint(checkpoint)
    assert last_complete_checkpoint(tmp_path) == checkpoint


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_cut_short_or_empty_is_named(tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path, 1) / name
    content = path.read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], b""):
        path.write_bytes(damaged)
        with pytest.raises(DamagedCheckpointError, match=rf"checkpoint-1/{name}: the checkpoint is damaged"):
            check_checkpoint(path.parent)
    path.unlink()
    with pytest.raises(DamagedCheckpointError, match=rf"{name}: .*delete the folder .*checkpoint-1 to go on"):
        check_checkpoint(path.parent)


def test_a_flipped_byte_in_the_optimizer_is_noticed(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1) / "optimizer.pt"
    content = bytearray(path.read_bytes())
    position = content.find(torch.arange(8.0).numpy().tobytes())
    content[position + 5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DamagedCheckpointError, match="another checksum"):
        check_checkpoint(path.parent)
