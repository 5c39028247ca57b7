"""Options that several verbs share, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TaskOption = Annotated[
    str,
    typer.Option(
        "--task", help="The task: copy, duplicate, image-lm, listops, mqar, reverse, text, text-lm or text-mlm."
    ),
]
PresetOption = Annotated[
    str,
    typer.Option(
        "--preset",
        help="Settings of the task: quick, another of its presets, or your own file, ./my-preset.toml; with other "
        "training settings behind colons, as quick:learning_rate=3e-4.",
    ),
]
OfTask = Annotated[str | None, typer.Option("--task", help="Of this task alone.", show_default="all tasks")]
OfPreset = Annotated[str | None, typer.Option("--preset", help="Under this preset alone.", show_default="all presets")]
MixersOption = Annotated[
    str | None,
    typer.Option(
        "--mixers",
        help="Mechanisms, separated by commas: name, name:option=value, ./file.py:ConfigClass; a list "
        "stands in brackets: longformer:dilation=[1,2].",
        show_default="all",
    ),
]
Seeds = Annotated[int, typer.Option(min=1, help="Runs of each set-up, one a seed.")]
Seed = Annotated[int, typer.Option(min=0, help="First seed of initialisation, data order and dropout.")]
Output = Annotated[Path, typer.Option(help="Folder of records and report.")]
DEFAULT_OUTPUT = Path("subquad-results")
Data = Annotated[
    Path | None,
    typer.Option(help="Your own files, instead of generated ones: a folder, or for the text tasks also a file."),
]
Force = Annotated[bool, typer.Option("--force", help="Measure again what is recorded already.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the runs, their sizes and the expected time; run nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
