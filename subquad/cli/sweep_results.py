"""What `sweep` does once its trials are known, and what it prints: best trials, failed ones, a recommendation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from subquad.benchmark.grid import Trial
from subquad.benchmark.recommendation import recommend
from subquad.benchmark.request import Request
from subquad.benchmark.sweep import SweepResult, TrialResult, Tuned, sweep, sweep_record
from subquad.cli.console import ACCENT, QUIET, WARNING, output_console, plain_table, print_document, progress_console
from subquad.cli.observer import BarObserver
from subquad.cli.progress import Progress
from subquad.cli.results import answer_document, recommendation_text, summary_document
from subquad.records.store import write_sweep
from subquad.report.page import write_report
from subquad.tasks.base import TaskData


def run_sweep(
    request: Request, trials: Sequence[Trial], data: TaskData[Any], *, grid: Sequence[str], as_json: bool
) -> None:
    """Train the trials, keep the choice, write the report, print the best of each mechanism and the recommendation."""
    with Progress(progress_console()) as bars:
        result = sweep(request, trials, data, BarObserver(bars))
    write_sweep(request.output, sweep_record(result, request, grid))
    page = write_report(request.output)
    if as_json:
        print_document(_document(result, page))
    else:
        _print_result(output_console(), result, page)


def _print_result(console: Console, result: SweepResult, page: Path) -> None:
    comparison, first = result.comparison, result.tuned[0]
    trials, seeds = len(first.results), len(first.results[0].entry.runs)
    facts = [f"{comparison.preset} preset", _counted(trials, "trial") + " of each mechanism", _counted(seeds, "seed")]
    console.print(Text(comparison.task.title, "bold"))
    console.print(Text(", ".join([*facts, comparison.protocol.hardware]), QUIET))
    console.print("", _best_trials(result.tuned), "", sep="\n")
    kind = comparison.kind
    console.print(
        Text(
            f"Best trial: the one with the best validation {kind.title} ({kind.direction}), the mean over its seeds; "
            f"test {kind.title} of that one, ± standard error. A trial counts where every seed ended well.",
            QUIET,
        )
    )
    at_edges = [f"{each.mechanism} {name}" for each in result.tuned for name in each.at_edge]
    if at_edges:
        console.print(Text(f"Best at the edge of what was tried, so go further: {', '.join(at_edges)}.", WARNING))
    for each in result.tuned:
        for failed in each.failed:
            console.print(Text(f"{failed.entry.label}: {failed.entry.reason}", WARNING))
    console.print("", recommendation_text(recommend(comparison)), "", sep="\n")
    console.print(Text.assemble(("Report  ", f"bold {ACCENT}"), str(page.resolve())), soft_wrap=True)


def _best_trials(tuned: Sequence[Tuned]) -> Table:
    kind, table = tuned[0].kind, plain_table()
    for title in ("Mechanism", "Best trial", "Validation", f"Test {kind.title}", "Trials"):
        table.add_column(title, justify="left" if title in ("Mechanism", "Best trial") else "right")
    for each in tuned:
        best, count = each.best, f"{len(each.results)}"
        trials = f"{len(each.results) - len(each.failed)} of {count} ok" if each.failed else count
        if best is None or best.entry.validation is None or best.entry.best is None:
            table.add_row(each.mechanism, "–", "–", "–", trials, style=WARNING)
            continue
        test = kind.cell(best.entry.best.mean, best.entry.best.standard_error)
        point = best.trial.point_text or "as it is"
        table.add_row(each.mechanism, point, kind.cell(best.entry.validation), test, trials)
    return table


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def _document(result: SweepResult, page: Path) -> dict[str, Any]:
    """The same as one JSON document, figures raw, with every trial."""
    mechanisms = [
        {
            "mechanism": each.mechanism,
            "at_edge": list(each.at_edge),
            "best": None if each.best is None else _trial_document(each.best),
            "trials": [_trial_document(trial) for trial in each.results],
        }
        for each in result.tuned
    ]
    return answer_document(result.comparison) | {"mechanisms": mechanisms, "page": str(page.resolve())}


def _trial_document(result: TrialResult) -> dict[str, Any]:
    entry, set_up = result.entry, result.trial.set_up
    return {
        "settings": result.trial.settings,
        "options": result.trial.options,
        "mixer": entry.runs[0].mixer,
        "preset": set_up.preset.text,
        "validation": entry.validation,
        "test": summary_document(entry.best),
        "status": entry.status,
        "reason": entry.reason,
        "commands": [run.command for run in entry.runs],
    }
