"""Where the command line writes: results to standard output, everything else to standard error.

Both consoles follow the terminal: without one they write plain text, 80 columns wide; `NO_COLOR` takes the colour away.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

GOOD, WARNING, BAD = "green", "yellow", "red"
ACCENT, QUIET = "cyan", "bright_black"
YES, NO, UNKNOWN = "✓", "·", "?"


def output_console() -> Console:
    """The console of results: standard output."""
    return Console(highlight=False)


def progress_console() -> Console:
    """The console of progress and messages: standard error."""
    return Console(stderr=True, highlight=False)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner beside `what` while the block runs; nothing where there is no terminal."""
    with progress_console().status(what, spinner_style=ACCENT):
        yield


def print_document(document: Any) -> None:
    """Print one JSON document on standard output, plain even on a terminal, so that it can always be parsed.

    Raises:
        ValueError: a figure that is not finite.
    """
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def plain_table() -> Table:
    """A table without frame; the style of all tables here."""
    return Table(box=None, header_style=f"bold {ACCENT}", padding=(0, 2, 0, 0), pad_edge=False)
