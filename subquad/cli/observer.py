"""Draws what the benchmark tells its observer: one bar for each step."""

from __future__ import annotations

from dataclasses import dataclass

from subquad.cli.progress import Bar, Progress


@dataclass(frozen=True)
class BarStep:
    """A step and its bar."""

    bar: Bar

    def progress(self, done: int, total: int, note: str) -> None:
        """Move the bar."""
        self.bar.update(done, total=total, note=note)

    def end(self, note: str, *, failed: bool = False) -> None:
        """Turn the bar into a line."""
        self.bar.finish(note, failed=failed)


@dataclass(frozen=True)
class BarObserver:
    """The observer of a command."""

    bars: Progress

    def begin(self, what: str) -> BarStep:
        """Start a bar."""
        return BarStep(self.bars.start(what))

    def say(self, sentence: str) -> None:
        """Print a line."""
        self.bars.say(sentence)
