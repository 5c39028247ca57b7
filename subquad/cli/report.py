"""`subquad report`: the page, the tables and a still picture, from the records that are there. Nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subquad.cli.options import DEFAULT_OUTPUT, Json, OfPreset, OfTask, Output

if TYPE_CHECKING:  # loaded when the verb is called
    from subquad.records.comparison import Comparison
    from subquad.records.store import Records


def command(
    task: OfTask = None,
    preset: OfPreset = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also draw score against speed against memory of one comparison, for a README or a paper, as a "
            ".png or .svg.",
            show_default="none",
        ),
    ] = None,
    dark: Annotated[bool, typer.Option("--dark", help="Draw the picture for a dark page.")] = False,
    output: Output = DEFAULT_OUTPUT,
    as_json: Json = False,
) -> None:
    """Write the page from the records that are there, and print tables and recommendations.

    The page holds everything; --task and --preset choose what is printed and drawn.
    """
    from subquad.cli.console import output_console, print_document
    from subquad.cli.results import chosen_comparisons, print_results, results_document
    from subquad.records.store import read_all
    from subquad.report.page import write_report

    if dark and picture is None:
        raise ValueError("--dark is of the picture; name its file with --picture")
    records = read_all(output)
    found = chosen_comparisons(records, task=task, preset=preset)
    if picture is not None:
        _draw(picture, records, found, dark=dark)
    page = write_report(output)
    if as_json:
        print_document(results_document(records, page, found))
    else:
        print_results(output_console(), records, page, found)


def _draw(picture: Path, records: Records, found: Sequence[Comparison], *, dark: bool) -> None:
    from subquad.report.still_picture import write_bubble_picture

    if len(found) != 1:
        raise ValueError(
            f"--picture draws one comparison, and {len(found)} are recorded; choose one with --task and --preset"
        )
    if not picture.parent.is_dir():
        raise ValueError(f"--picture {picture}: there is no folder {picture.parent}; make it first")
    write_bubble_picture(records, found[0], picture, scheme="dark" if dark else "light")
