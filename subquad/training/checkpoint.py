"""Which checkpoint of a run can be trusted.

Hugging Face's trainer writes a checkpoint file by file and `trainer_state.json` last, so a folder without a readable
one was interrupted and is passed over. A folder that has one but can't be loaded is damaged, and that is an error.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

_STATE_FILE = "trainer_state.json"


class CheckpointError(ValueError):
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


def _is_complete(checkpoint: Path) -> bool:
    try:
        state = TrainerState.load_from_json(str(checkpoint / _STATE_FILE))
    except (OSError, json.JSONDecodeError, TypeError):
        return False
    return state.global_step == checkpoint_step(checkpoint)
