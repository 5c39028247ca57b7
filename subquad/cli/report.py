"""`subquad report`: the page and the tables, from the records that are there. Nothing is measured."""

from __future__ import annotations

from pathlib import Path

from subquad.cli.options import Json, Output


def command(output: Output = Path("subquad-results"), as_json: Json = False) -> None:
    """Write the page from the records that are there, and print tables and recommendations."""
    from subquad.cli.console import output_console, print_document
    from subquad.cli.results import print_results, results_document
    from subquad.records.store import read_all
    from subquad.report.page import write_report

    page = write_report(output)
    records = read_all(output)
    if as_json:
        print_document(results_document(records, page))
    else:
        print_results(output_console(), records, page)
