"""A trained model as a folder that `from_pretrained` reads, whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from transformers import PreTrainedModel


def check_free(directory: Path) -> None:
    """Check, before any work is done, that a model can be saved here.

    Raises:
        ValueError: something is there already.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} holds something already; name a new folder with --save-model")


def save_model(model: PreTrainedModel, directory: Path) -> None:
    """Write config and weights to a folder beside it, then rename that.

    Raises:
        ValueError: something is there already.
    """
    check_free(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        model.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        unfinished.replace(directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
