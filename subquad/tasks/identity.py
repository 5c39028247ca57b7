"""What all kinds of task data say of themselves alike: names, splits and their hash."""

from __future__ import annotations

from typing import Any

from subquad.tasks.base import DataPreset, hash_splits
from subquad.tasks.splits import SplitT


def identity(task: str, preset: DataPreset, splits: dict[str, SplitT], *, title: str | None = None) -> dict[str, Any]:
    """The fields of `TaskData` that follow from task, preset and splits.

    Args:
        task: its name.
        preset: which examples; names the data and, unless `title` is given, titles them.
        splits: train, validation and test.
        title: of data that are not those the preset speaks of, which then are not Long Range Arena's either.
    """
    return {
        "name": task,
        "preset": preset.name,
        "title": preset.title if title is None else title,
        "is_lra": preset.is_lra and title is None,
        "data_hash": hash_splits(*splits.values()),
        **splits,
    }
