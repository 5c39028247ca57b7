"""Where the data of a task lies under an output folder: one place, so that every command finds the same files."""

from __future__ import annotations

from pathlib import Path

from subquad.training.presets import Preset


def data_directory(output: Path, preset: Preset) -> Path:
    """The folder of a task's generated data under one preset: `<output>/data/<task>/<preset>`.

    A preset named by the path of its file is called after the file; training settings change no data.
    """
    return output / "data" / preset.task / preset.data.name
