"""Who hears what a long job is doing; the command line draws it, a test keeps it, nobody prints."""

from __future__ import annotations

from typing import Protocol


class Step(Protocol):
    """A step that is running."""

    def progress(self, done: int, total: int, note: str) -> None:
        """How far it is."""
        ...

    def end(self, note: str, *, failed: bool = False) -> None:
        """It ended, with what came out of it."""
        ...


class Observer(Protocol):
    """Hears of steps as they begin, and of whatever is worth knowing between them."""

    def begin(self, what: str) -> Step:
        """A step begins."""
        ...

    def say(self, sentence: str) -> None:
        """Something worth knowing."""
        ...
