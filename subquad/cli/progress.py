"""Progress of long work: a live bar for what is running, one line with its time for what is finished.

On a terminal the bars move below the finished lines. Elsewhere (a file, a pipe, CI) each piece of work is a line when
it begins and a line when it ends. Leaving the `with` block by an error or by Ctrl-C says what was still running.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from subquad.cli.console import ACCENT, BAD, GOOD, QUIET
from subquad.records import units


class Bar:
    """One piece of work; made by `Progress.start`."""

    def __init__(self, owner: Progress, description: str, task: TaskID | None) -> None:
        self.description = description
        self._owner = owner
        self._task = task
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall-clock time since the start."""
        return time.monotonic() - self._began

    def update(self, done: float, *, total: float | None = None, note: str | None = None) -> None:
        """Move the bar.

        Args:
            done: in the unit of the total.
            total: where it was not known at the start.
            note: shown behind the bar; None leaves the last one.
        """
        self._owner.move(self._task, done, total, note)

    def finish(self, note: str = "", *, failed: bool = False) -> None:
        """Replace the bar by a line with the time taken and a note; `failed` marks work that did not succeed."""
        self._owner.close(self, self._task, note, failed=failed)


class Progress:
    """The bars of one command.

    Args:
        console: where to; standard error, so that results on standard output stay clean.

    Example:
        with Progress(progress_console()) as bars:
            bar = bars.start("training local, seed 0", total=600)
            bar.update(150, note="validation 41.2 %")
            bar.finish("test 43.0 %")
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._running: list[Bar] = []
        self._live = _live_bars(console) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bar in list(self._running):
            bar.finish("interrupted" if kind is KeyboardInterrupt else "failed", failed=True)
        if self._live is not None:
            self._live.stop()

    def start(self, description: str, total: float | None = None) -> Bar:
        """Begin a piece of work of `total` units; None where that is not known yet."""
        task = None
        if self._live is None:
            self._console.print(f"{description} ...", markup=False, soft_wrap=True)
        else:
            task = self._live.add_task(description, total=total, note="")
        bar = Bar(self, description, task)
        self._running.append(bar)
        return bar

    def say(self, sentence: str) -> None:
        """Print a line above the bars."""
        self._console.print(Text(f"  {sentence}", QUIET), soft_wrap=True)

    def move(self, task: TaskID | None, done: float, total: float | None, note: str | None) -> None:
        """Move the bar of `task`; without a terminal nothing is drawn."""
        if self._live is None or task is None:
            return
        self._live.update(task, completed=done)
        if total is not None:
            self._live.update(task, total=total)
        if note is not None:
            self._live.update(task, note=note)

    def close(self, bar: Bar, task: TaskID | None, note: str, *, failed: bool) -> None:
        """Replace the bar of `task` by its line; a second call does nothing."""
        if bar not in self._running:
            return
        self._running.remove(bar)
        if self._live is not None and task is not None:
            self._live.remove_task(task)
        mark, style = ("✗", BAD) if failed else ("✓", GOOD)
        description = bar.description if self._live is None else f"{bar.description:<36}"
        line = Text.assemble((mark, style), f" {description}  ", (f"{units.seconds(bar.seconds):>9}", QUIET))
        self._console.print(line.append(f"  {note}" if note else ""), soft_wrap=True)


def _live_bars(console: Console) -> rich.progress.Progress:
    described, remaining, noted = (36 if console.width >= 100 else 28), 17, 18
    # The last columns stay free: the terminal echoes ^C there, and a line that it makes too long is not erased.
    bar = max(4, console.width - described - remaining - noted - 8)

    def text(template: str, width: int, style: str = "none") -> TextColumn:
        column = Column(no_wrap=True, overflow="ellipsis", min_width=width, max_width=width)
        return TextColumn(template, style=style, markup=False, table_column=column)

    return rich.progress.Progress(
        SpinnerColumn(style=ACCENT, table_column=Column(width=1)),
        text("{task.description}", described),
        BarColumn(bar_width=bar, complete_style=ACCENT, finished_style=ACCENT),
        _Remaining(table_column=Column(no_wrap=True, width=remaining)),
        text("{task.fields[note]}", noted, QUIET),
        console=console,
        transient=True,
    )


class _Remaining(ProgressColumn):
    """Per cent done and the time that is left, or the time taken where neither is known."""

    max_refresh = 0.5

    def render(self, task: rich.progress.Task) -> Text:
        """The column's text."""
        if task.total is None or not task.completed:
            return Text(_roughly(task.elapsed or 0), QUIET, justify="right")
        left = "" if task.time_remaining is None else f"{_roughly(task.time_remaining)} left"
        return Text.assemble(f"{task.percentage:3.0f} %", (f" {left:>11}", QUIET))


def _roughly(seconds: float) -> str:
    """A duration to the second below two minutes, to the minute above."""
    return f"{round(seconds)} s" if seconds < 120 else f"{round(seconds / 60):,} min"
