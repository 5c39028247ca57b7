"""What `subquad data` does and prints: the files of a task, and what one should know of them before training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from subquad.benchmark.data import data_directory
from subquad.cli.console import ACCENT, QUIET, plain_table, progress_console
from subquad.cli.cores import cores
from subquad.cli.progress import Bar, Progress
from subquad.records import units
from subquad.records.metrics import metric_kind
from subquad.tasks.base import TaskData
from subquad.tasks.registry import load_task
from subquad.tasks.splits import Split
from subquad.training.presets import load_preset


@dataclass(frozen=True)
class TaskFacts:
    """A task's data and where it lies."""

    directory: Path
    files: dict[str, int]
    data: TaskData[Any]


def obtain(
    task: str, preset: str, directory: Path | None, *, output: Path, seed: int, workers: int | None, check: bool
) -> TaskFacts:
    """Read the data of a task, generating it first where that is wanted, with a progress bar.

    Args:
        task: its name.
        preset: name of the preset.
        directory: of the files; None for the place where `compare` with this output looks, too.
        output: folder of records, under which generated data lie.
        seed: of the generator.
        workers: processes that generate; None for one a core.
        check: read what is there and generate nothing; so it is, too, with a folder for a task without examples.

    Raises:
        ValueError: unknown task or preset, files that are missing, malformed or another's, a folder not writable.
    """
    loader, settings = load_task(task), load_preset(task, preset)
    check = check or (directory is not None and not loader.has_examples)
    directory = directory or data_directory(output, settings)
    with Progress(progress_console()) as bars:
        if check:
            bar = bars.start(f"reading {directory}")
            data = loader.read(directory, settings.data)
        else:
            bar = bars.start(f"preparing {task}, {preset}")
            data = loader.prepare(
                directory,
                settings.data,
                seed=seed,
                workers=workers or cores(),
                progress=lambda done, total: _move(bar, done, total),
            )
        bar.finish(f"{units.count(sum(map(len, data.splits.values())))} examples")
    files = {
        str(path.relative_to(directory)): path.stat().st_size for path in sorted(directory.rglob("*")) if path.is_file()
    }
    return TaskFacts(directory.resolve(), files, data)


def _move(bar: Bar, done: int, total: int) -> None:
    bar.update(done, total=total, note="reading" if done == total else "generating")


def document(facts: TaskFacts) -> dict[str, Any]:
    """The facts, JSON-ready."""
    data, guess = facts.data, facts.data.guess()
    return {
        "task": data.name,
        "preset": data.preset,
        "title": data.title,
        "is_lra": data.is_lra,
        "directory": str(facts.directory),
        "files": facts.files,
        "data_hash": data.data_hash,
        "vocab_size": data.vocab_size,
        "pad_token_id": data.pad_token_id,
        "max_length": data.max_length,
        "objective": data.objective,
        **data.facts(),
        "metric": data.metric,
        "guess": asdict(guess),
        "splits": {name: split_document(split) | data.split_facts(split) for name, split in data.splits.items()},
    }


def split_document(split: Split) -> dict[str, Any]:
    """Number of examples and the lengths of their inputs in tokens."""
    lengths = split.lengths
    return {
        "examples": len(split),
        "shortest": int(lengths.min()),
        "median_length": float(np.median(lengths)),
        "mean_length": float(lengths.mean()),
        "longest": int(lengths.max()),
    }


def render(facts: TaskFacts) -> Group:
    """The facts for a terminal."""
    data, guess = facts.data, facts.data.guess()
    described = {
        **_whereabouts(facts),
        "checksum": f"{data.data_hash}, which equal examples have on every machine",
        "asked for": data.summary(),
        "vocabulary": f"{data.vocab_size} token ids",
        "longest allowed": f"{units.count(data.max_length)} tokens",
        "guess": f"what {guess.answer} scores {metric_kind(data.metric).write(guess.test)} on the test split",
    }
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style=ACCENT)
    for name, value in described.items():
        table.add_row(f"  {name}", Text(value, overflow="fold"))
    return Group(Text(data.title, "bold"), table, "", Padding(_split_table(facts), (0, 0, 0, 2)))


def _whereabouts(facts: TaskFacts) -> dict[str, str]:
    """Folder and size of the files, if there are any."""
    if not facts.files:
        return {"files": "none; the examples are made when they are needed"}
    size = units.size(sum(facts.files.values()))
    return {"folder": str(facts.directory), "size": f"{size} in {len(facts.files)} files"}


def _split_table(facts: TaskFacts) -> Table:
    table = plain_table()
    table.add_column("split")
    for title in ("examples", "shortest", "median", "mean", "longest"):
        table.add_column(title, justify="right")
    for name, split in facts.data.splits.items():
        row = split_document(split)
        lengths = (row["shortest"], row["median_length"], row["mean_length"], row["longest"])
        table.add_row(name, units.count(row["examples"]), *(units.count(length) for length in lengths))
    table.caption, table.caption_style, table.caption_justify = "lengths in tokens", QUIET, "left"
    return table
