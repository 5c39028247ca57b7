"""What is printed of finished work: the tables, which mechanism to use and why, and where the page lies.

`compare` and `report` end with it. The numbers are those of the page, from `report.tables`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from subquad.benchmark.recommendation import Recommendation, Verdict, recommend
from subquad.cli.console import ACCENT, BAD, GOOD, QUIET, WARNING, plain_table
from subquad.records import units
from subquad.records.comparison import Comparison, Entry
from subquad.records.measures import Summary
from subquad.records.queries import comparisons
from subquad.records.store import Records
from subquad.report.positions import places_of, position_note, positions_of
from subquad.report.tables import Row, cells, column_titles, rows_of, stream_note

COLUMNS = (
    ("mechanism", "Mechanism"),
    ("best", "Test {metric}"),
    ("speed", "Speed"),
    ("step_time", "Fwd + bwd"),
    ("saved", "Kept"),
    ("parameters", "Parameters"),
    ("train_time", "Training"),
    ("memory", "Memory"),
    ("status", "Status"),
)
"""Columns as the page calls them, with headings short enough for a terminal."""

_DISPENSABLE = ("memory", "train_time", "parameters", "saved")
"""Columns that are left out, in this order, where the terminal is too narrow."""

_STYLES = {
    Verdict.USE: GOOD,
    Verdict.KEEP_DENSE: GOOD,
    Verdict.TRAIN_LONGER: WARNING,
    Verdict.NOTHING_FINISHED: BAD,
}


def print_results(console: Console, records: Records, page: Path, found: Sequence[Comparison]) -> None:
    """Print the table and the recommendation of these comparisons of the records, and the path of the page."""
    for comparison in found:
        _print_comparison(console, comparison)
    if not found:
        count = len(records.profiles)
        console.print(f"No training runs yet; {count} speed profile{'' if count == 1 else 's'} in the page.")
    for file in records.unreadable:
        console.print(Text(f"Left out: {file.reason}", WARNING), soft_wrap=True)
    console.print(Text.assemble(("Report  ", f"bold {ACCENT}"), str(page.resolve())), soft_wrap=True)


def _print_comparison(console: Console, comparison: Comparison) -> None:
    rows, recommendation = rows_of(comparison), recommend(comparison)
    _print_head(console, comparison)
    console.print(comparison_table(rows, console.width, recommendation.winner), "", sep="\n")
    for note in _notes(rows, comparison):
        console.print(Text(note, QUIET))
    console.print("", recommendation_text(recommendation), "", sep="\n")


def _print_head(console: Console, comparison: Comparison) -> None:
    seeds = max(len(entry.runs) for entry in comparison.entries)
    facts = f"{comparison.preset} preset, {seeds} seed{'' if seeds == 1 else 's'}, {comparison.protocol.hardware}"
    console.print(Text(comparison.task.title, "bold"), Text(facts, QUIET), "", sep="\n")


def comparison_table(rows: Sequence[Row], width: int, winner: Entry | None = None) -> Table:
    """The rows as a table of at most `width` columns of text; the least telling columns give way."""
    texts = [cells(row) | {"mechanism": f"{row.label}{' ◆' if row.on_pareto_front else ''}"} for row in rows]
    titles = column_titles(rows[0].comparison.kind, COLUMNS)
    columns = _fitting(titles, texts, width)
    table = plain_table()
    for key, title in columns:
        table.add_column(title, justify="left" if key in ("mechanism", "status") else "right", no_wrap=True)
    for row, text in zip(rows, texts, strict=True):
        table.add_row(*(text[key] for key, _ in columns), style=_row_style(row, winner))
    return table


def _row_style(row: Row, winner: Entry | None) -> str:
    if row.entry is None:
        return QUIET
    if row.entry is winner:
        return f"bold {GOOD}"
    return "none" if row.has_figures else WARNING


def _fitting(titles: dict[str, str], texts: Sequence[dict[str, str]], width: int) -> list[tuple[str, str]]:
    columns = [
        (key, title) for key, title in titles.items() if key != "memory" or any(text[key] != "–" for text in texts)
    ]
    for dispensable in _DISPENSABLE:
        widths = [max(len(title), *(len(text[key]) for text in texts)) for key, title in columns]
        if sum(widths) + 2 * len(widths) <= width:
            break
        columns = [(key, title) for key, title in columns if key != dispensable]
    return columns


def _notes(rows: Sequence[Row], comparison: Comparison) -> list[str]:
    kind, tokens = comparison.kind, units.count(comparison.task.max_length)
    notes = [
        f"Test {kind.title} ({kind.direction}) at the step with the best validation score, ± standard error. Speed, "
        f"Fwd + bwd and Kept (for backward): the mechanism alone at {tokens} tokens; speed against dense fused "
        "attention."
    ]
    if any(row.on_pareto_front for row in rows):
        notes.append("◆ on the Pareto front: none is better in score, speed and memory at once.")
    notes += [note for note in (position_note(comparison), stream_note(comparison)) if note]
    unequal = [row.label for row in rows if row.unequal_parameters]
    if unequal:
        notes.append(f"* parameters more than 10 % from those of the dense model: {', '.join(unequal)}.")
    return notes + [f"{row.label}: {row.reason}" for row in rows if row.entry is not None and row.reason]


def recommendation_text(recommendation: Recommendation) -> Padding:
    """The recommendation in its sentences, with a bar in the colour of the verdict."""
    style = _STYLES[recommendation.verdict]
    first, *others = recommendation.sentences
    table = Table.grid(padding=(0, 1))
    table.add_row(Text("➜", f"bold {style}"), Text.assemble((first, "bold"), *(f" {text}" for text in others)))
    return Padding(table, 0)


def results_document(records: Records, page: Path, found: Sequence[Comparison]) -> dict[str, Any]:
    """The same as one JSON document, figures raw: scores as recorded (accuracies in 0..1), seconds, bytes."""
    return {
        "page": str(page.resolve()),
        "comparisons": [_comparison_document(comparison) for comparison in found],
        "profiles": len(records.profiles),
        "unreadable": [{"path": str(file.path), "reason": file.reason} for file in records.unreadable],
    }


def chosen_comparisons(records: Records, *, task: str | None, preset: str | None) -> tuple[Comparison, ...]:
    """The comparisons of a task and preset; None for all.

    Raises:
        ValueError: there is none of that task or preset; the message names what is recorded.
    """
    found = comparisons(records)
    chosen = tuple(
        comparison
        for comparison in found
        if task in (None, comparison.task.name) and preset in (None, comparison.preset, comparison.protocol.preset)
    )
    if not chosen and (task, preset) != (None, None):
        known = ", ".join(dict.fromkeys(f"{each.task.name} ({each.preset})" for each in found)) or "none"
        raise ValueError(f"no such comparison is recorded; there are: {known}. Run `subquad compare` first.")
    return chosen


def print_recommendations(console: Console, found: Sequence[Comparison]) -> None:
    """Print for each comparison what it is and which mechanism to use."""
    for comparison in found:
        _print_head(console, comparison)
        console.print(recommendation_text(recommend(comparison)), "", sep="\n")


def recommendations_document(found: Sequence[Comparison]) -> dict[str, Any]:
    """The same as one JSON document."""
    return {"recommendations": [answer_document(comparison) for comparison in found]}


def answer_document(comparison: Comparison) -> dict[str, Any]:
    """What a comparison is and which mechanism to use, as one JSON document."""
    recommendation = recommend(comparison)
    return {
        "task": comparison.task.name,
        "title": comparison.task.title,
        "preset": comparison.preset,
        "hardware": comparison.protocol.hardware,
        "metric": {"name": comparison.kind.name, "higher_is_better": comparison.kind.higher_is_better},
        "recommendation": {
            "verdict": recommendation.verdict.value,
            "winner": recommendation.winner and recommendation.winner.label,
            "equals": [entry.label for entry in recommendation.equals],
            "sentences": list(recommendation.sentences),
        },
    }


def _comparison_document(comparison: Comparison) -> dict[str, Any]:
    rows = [_row_document(row) for row in rows_of(comparison)]
    return answer_document(comparison) | {"positions_of": positions_of(comparison), "rows": rows}


def _row_document(row: Row) -> dict[str, Any]:
    plain = ("relative_speed", "step_seconds", "saved_bytes", "kept_bytes", "peak_bytes", "parameters", "steps")
    return {
        "mechanism": row.label,
        "mixer": row.entry.runs[0].mixer if row.entry else None,
        "best": summary_document(row.best),
        "last": summary_document(row.last),
        **{name: getattr(row, name) for name in plain},
        "train_seconds": row.train_seconds,
        "carries_state": row.entry.carries_state if row.entry else None,
        "by_position": [asdict(place) for place in places_of(row.entry)] if row.entry else [],
        "unequal_parameters": row.unequal_parameters,
        "on_pareto_front": row.on_pareto_front,
        "status": row.status,
        "reason": row.reason,
        "commands": list(row.commands),
    }


def summary_document(summary: Summary | None) -> dict[str, Any] | None:
    """Test scores as one JSON document: mean, standard error and one value a seed."""
    if summary is None:
        return None
    return {"mean": summary.mean, "standard_error": summary.standard_error, "seeds": list(summary.values)}
