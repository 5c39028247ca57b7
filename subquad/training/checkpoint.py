"""Which checkpoint of a run can be trusted.

Hugging Face's trainer writes a checkpoint file by file and `trainer_state.json` last, so a folder without a readable
one was interrupted and is passed over. A folder that has one but whose files are cut short is damaged, and that is an
error: going on silently from an older one would give a run that nobody asked for.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

_STATE_FILE = "trainer_state.json"
_WEIGHTS_FILE = "model.safetensors"
STREAM_FILE = "stream.safetensors"
"""What the mixers of a model that carries its state held at the end of the step."""

_ARCHIVES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


class DamagedCheckpointError(ValueError):
    """A checkpoint is damaged."""


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return directory / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def checkpoint_step(checkpoint: Path) -> int:
    """The step of a checkpoint folder."""
    return int(checkpoint.name.rpartition("-")[2])


def last_complete_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint under `directory` that was written to its end, or None."""
    found = [path for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    return next((path for path in sorted(found, key=checkpoint_step, reverse=True) if _is_complete(path)), None)


def read_state(checkpoint: Path) -> TrainerState:
    """The trainer's state: step, history, best score."""
    return TrainerState.load_from_json(str(checkpoint / _STATE_FILE))


def check_checkpoint(checkpoint: Path, *, of_stream: bool = False) -> None:
    """Check that every file of a checkpoint can be read to its end; nothing in them is executed.

    Args:
        checkpoint: its folder.
        of_stream: whether the state of a stream has to be there, too.

    Raises:
        DamagedCheckpointError: naming the file and what to do.
    """
    for name in (_WEIGHTS_FILE, *_ARCHIVES, *((STREAM_FILE,) if of_stream else ())):
        fault = _fault(checkpoint / name)
        if fault is not None:
            raise DamagedCheckpointError(
                f"{checkpoint / name}: the checkpoint is damaged ({fault}); delete the folder {checkpoint} to go on "
                f"from the checkpoint before, or {checkpoint.parent} to begin this run again"
            )


def _fault(path: Path) -> str | None:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return None
        except (OSError, SafetensorError) as error:
            return str(error)
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        return str(error)
    return None if broken is None else f"{broken} in it has another checksum"


def _is_complete(checkpoint: Path) -> bool:
    try:
        return read_state(checkpoint).global_step == checkpoint_step(checkpoint)
    except (OSError, json.JSONDecodeError, TypeError):
        return False
