"""Where the data of a task lies under an output folder: one place, so that every command finds the same files."""

from __future__ import annotations

from pathlib import Path


def data_directory(output: Path, task: str, preset: str) -> Path:
    """The folder of a task's generated data under one preset: `<output>/data/<task>/<preset>`.

    A preset named by the path of its file is called after the file.
    """
    return output / "data" / task / Path(preset).name.removesuffix(".toml")
