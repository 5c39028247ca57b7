"""`subquad data`: the data of a task, generated or checked, with the facts about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subquad.cli.options import DEFAULT_OUTPUT, Json, Output, PresetOption, TaskOption


def command(
    task: TaskOption = "listops",
    preset: PresetOption = "quick",
    output: Output = DEFAULT_OUTPUT,
    directory: Annotated[
        Path | None,
        typer.Option("--data", help="Folder of the files.", show_default="<output>/data/<task>/<preset>"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the generator; the same seed gives the same files.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that generate.", show_default="one a core")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Read the files there, be they yours; generate none.")] = False,
    as_json: Json = False,
) -> None:
    """Generate the data of a task, or check what is there, and describe it."""
    from subquad.cli.console import output_console, print_document
    from subquad.cli.task_facts import document, obtain, render

    facts = obtain(task, preset, directory, output=output, seed=seed, workers=workers, check=check)
    if as_json:
        print_document(document(facts))
    else:
        output_console().print(render(facts))
