"""A process of our own for the heavy work, so that what kills it doesn't kill a comparison.

The parent sends a function and its arguments, receives progress and in the end the result. When the system ends the
worker, usually because memory ran out, the parent gets a `WorkerDiedError`, and the next call starts a new process.
Ctrl-C reaches the parent alone. When the parent ends, however it ends, its workers end at once. What is printed in a
worker goes to standard error, so that standard output holds results alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

import torch

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
            self._connection, theirs = multiprocessing.Pipe()
            self._process = start_process(_serve, theirs, self._mixers, torch.get_num_threads())
            theirs.close()
        return self._connection


def start_process(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start `target(*arguments)` in a fresh process that Ctrl-C doesn't reach, not even while it is starting."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)
    resource_tracker.ensure_running()  # started with the first process otherwise, and would end the blocking below
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited; ours comes when it is lifted
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process


def become_worker(threads: int) -> None:
    """Make this process, just started, what a worker has to be: as many torch threads as the parent, and see above."""
    torch.set_num_threads(threads)
    sys.stdout.flush()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _answer(connection: Connection, answer: tuple[str, Any]) -> None:
    try:
        connection.send(answer)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:  # the result can't be pickled
        connection.send(("error", (type(error).__name__, str(error), traceback.format_exc())))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _serve(connection: Connection, mixers: Sequence[str], threads: int) -> None:
    become_worker(threads)

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
            except (Exception, SystemExit) as error:
                answer = ("error", (type(error).__name__, str(error), traceback.format_exc()))
            _answer(connection, answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
