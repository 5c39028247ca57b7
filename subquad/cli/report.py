"""`subquad report`: the page and the tables, from the records that are there. Nothing is measured."""

from __future__ import annotations

from subquad.cli.options import DEFAULT_OUTPUT, Json, OfPreset, OfTask, Output


def command(
    task: OfTask = None, preset: OfPreset = None, output: Output = DEFAULT_OUTPUT, as_json: Json = False
) -> None:
    """Write the page from the records that are there, and print tables and recommendations.

    The page holds everything; --task and --preset choose what is printed.
    """
    from subquad.cli.console import output_console, print_document
    from subquad.cli.results import chosen_comparisons, print_results, results_document
    from subquad.records.store import read_all
    from subquad.report.page import write_report

    page = write_report(output)
    records = read_all(output)
    found = chosen_comparisons(records, task=task, preset=preset)
    if as_json:
        print_document(results_document(records, page, found))
    else:
        print_results(output_console(), records, page, found)
