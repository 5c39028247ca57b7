"""What tests of the benchmark put in the place of the real: a worker without a process, an observer that keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from subquad.benchmark.plan import RunPlan
from subquad.benchmark.worker import Progress, Worker, WorkError

OWN = Path(__file__).parent / "own_mechanisms.py"

MakePlan = Callable[..., RunPlan]


class InProcess(Worker):
    """Does in this process what a worker does in its own."""

    def call(self, function: Callable[..., Any], *arguments: Any, progress: Progress | None = None) -> Any:
        try:
            return function(*arguments, progress or (lambda done, total, note: None))
        except Exception as error:
            raise WorkError(type(error).__name__, str(error), "") from error


class Recorder:
    """An observer, and the steps that it began; keeps what it hears."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[tuple[str, bool]] = []
        self.said: list[str] = []

    def begin(self, what: str) -> Recorder:
        self.begun.append(what)
        return self

    def progress(self, done: int, total: int, note: str) -> None:
        assert 0 <= done <= total

    def end(self, note: str, *, failed: bool = False) -> None:
        self.ended.append((note, failed))

    def say(self, sentence: str) -> None:
        self.said.append(sentence)
