"""`subquad doctor`: this machine, this installation, and what to do where something is missing."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from subquad.cli.console import ACCENT, BAD, GOOD, WARNING, output_console, print_document, waiting
from subquad.cli.options import DEFAULT_OUTPUT, Json, Output

if TYPE_CHECKING:
    from subquad.cli.machine import Check

_MARKS = {"good": ("✓", GOOD), "warning": ("!", WARNING), "bad": ("✗", BAD)}


def command(output: Output = DEFAULT_OUTPUT, as_json: Json = False) -> None:
    """Check this machine, this installation and the results folder; exit code 1 where something is broken."""
    from subquad.cli.machine import Level, checks

    with waiting("looking at this machine"):
        found = checks(output)
    healthy = all(check.level is not Level.BAD for check in found)
    if as_json:
        print_document({"healthy": healthy, "checks": [asdict(check) for check in found]})
    else:
        output_console().print(render(found))
    if not healthy:
        raise typer.Exit(1)


def render(found: tuple[Check, ...]) -> Group:
    """A line for each check, under its subject; below a line that is not good, what to do."""
    parts: list[RenderableType] = []
    widest = max(len(check.name) for check in found)
    for subject in dict.fromkeys(check.subject for check in found):
        table = Table.grid(padding=(0, 2, 0, 0))
        for width in (1, widest):
            table.add_column(no_wrap=True, min_width=width)
        table.add_column(overflow="fold")
        for check in (check for check in found if check.subject == subject):
            mark, style = _MARKS[check.level.value]
            table.add_row(Text(mark, f"bold {style}"), check.name, Text(check.found))
            if check.remedy:
                table.add_row("", "", Text(check.remedy, style))
        parts += [Text(subject, f"bold {ACCENT}"), table, ""]
    return Group(*parts, _verdict(found))


def _verdict(found: tuple[Check, ...]) -> Text:
    counts = {level: sum(check.level.value == level for check in found) for level in _MARKS}
    if counts["bad"]:
        return Text(f"{counts['bad']} to repair, see the red lines.", f"bold {BAD}")
    count = counts["warning"]
    warnings = f", with {count} warning{'' if count == 1 else 's'}" if count else ""
    return Text.assemble((f"Ready{warnings}.", f"bold {WARNING if count else GOOD}"))
