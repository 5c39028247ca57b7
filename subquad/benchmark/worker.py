"""A process of our own for the heavy work, so that what kills it doesn't kill a comparison.

The parent sends a function and its arguments, receives progress and in the end the result. When the system ends the
worker, usually because memory ran out, the parent gets a `WorkerDiedError`, and the next call starts a new process.
Ctrl-C reaches the parent alone.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

from subquad.benchmark.mixers import parse_mixer

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, note)`."""


class WorkerDiedError(Exception):
    """The worker process ended without an answer."""

    def __init__(self, exit_code: int | None) -> None:
        killed = exit_code is not None and exit_code < 0
        how = f"was killed by signal {-exit_code}" if killed and exit_code is not None else f"ended with {exit_code}"
        super().__init__(f"the process {how}")
        self.out_of_memory = exit_code == -signal.SIGKILL
        """Whether it looks as if the system took it down for lack of memory."""


class WorkError(Exception):
    """The function raised in the worker.

    Attributes:
        kind: name of the exception's class.
        details: the traceback, as text.
    """

    def __init__(self, kind: str, message: str, details: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.details = details


class Worker:
    """Runs functions in another process, one at a time.

    Args:
        mixers: mixers as named on the command line; a user's own mechanisms are entered in the worker's registry too.
    """

    def __init__(self, mixers: Sequence[str] = ()) -> None:
        self._mixers = tuple(mixers)
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def call(self, function: Callable[..., Any], *arguments: Any, progress: Progress | None = None) -> Any:
        """`function(*arguments, progress)` in the worker; `function` is a module's own, and its result picklable.

        Raises:
            WorkError: the function raised.
            WorkerDiedError: the process ended.
        """
        connection = self._start()
        try:
            connection.send((function, arguments))
            while True:
                kind, content = connection.recv()
                if kind == "progress" and progress is not None:
                    progress(*content)
                elif kind == "result":
                    return content
                elif kind == "error":
                    raise WorkError(*content)
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            assert self._process is not None
            self._process.join()
            exit_code = self._process.exitcode
            self.stop()
            raise WorkerDiedError(exit_code) from error

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _start(self) -> Connection:
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._mixers), daemon=False)
            self._process.start()
            theirs.close()
        return self._connection


def _serve(connection: Connection, mixers: Sequence[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def report(done: int, total: int, note: str) -> None:
        connection.send(("progress", (done, total, note)))

    try:
        for text in mixers:
            parse_mixer(text)
        while True:
            function, arguments = connection.recv()
            try:
                answer = ("result", function(*arguments, report))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                answer = ("error", (type(error).__name__, str(error), traceback.format_exc()))
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
