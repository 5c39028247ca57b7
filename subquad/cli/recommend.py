"""`subquad recommend`: which mechanism to use, from the records that are there. Nothing is measured."""

from __future__ import annotations

from subquad.cli.options import DEFAULT_OUTPUT, Json, OfPreset, OfTask, Output


def command(
    task: OfTask = None, preset: OfPreset = None, output: Output = DEFAULT_OUTPUT, as_json: Json = False
) -> None:
    """Say of every comparison that is recorded which mechanism to use, and why; dense attention is an answer."""
    from subquad.cli.console import output_console, print_document
    from subquad.cli.results import chosen_comparisons, print_recommendations, recommendations_document
    from subquad.records.store import read_all

    found = chosen_comparisons(read_all(output), task=task, preset=preset)
    if not found:
        raise ValueError("no training run is recorded, so there is nothing to recommend; run `subquad compare` first")
    if as_json:
        print_document(recommendations_document(found))
    else:
        print_recommendations(output_console(), found)
