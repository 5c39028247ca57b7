"""`subquad recommend`: which mechanism to use, from the records that are there. Nothing is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subquad.cli.options import Json, Output

OneTask = Annotated[str | None, typer.Option("--task", help="Of this task alone.", show_default="all tasks")]


def command(
    task: OneTask = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="Under this preset alone.", show_default="all presets")
    ] = None,
    output: Output = Path("subquad-results"),
    as_json: Json = False,
) -> None:
    """Say of every comparison that is recorded which mechanism to use, and why; dense attention is an answer."""
    from subquad.cli.console import output_console, print_document
    from subquad.cli.results import chosen_comparisons, print_recommendations, recommendations_document
    from subquad.records.store import read_all

    found = chosen_comparisons(read_all(output), task=task, preset=preset)
    if as_json:
        print_document(recommendations_document(found))
    else:
        print_recommendations(output_console(), found)
