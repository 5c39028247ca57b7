"""What the user reads when a command fails, and the exit code that the shell gets.

One clear sentence instead of a traceback. Errors made for the user (`ValueError`, `OSError`) speak for themselves;
anything else is a mistake of subquad's and says so. Verbs raise; only `main` catches.
"""

from __future__ import annotations

import errno
import sys
from dataclasses import dataclass
from functools import singledispatch

from subquad.cli.extras import extra_of_module

WRONG_USE = 2
MISTAKE = 1
INTERRUPTED = 130


class UsageError(ValueError):
    """The command line can't be understood: unknown verb or option, a missing or malformed value."""


@dataclass(frozen=True)
class Failure:
    """How a command failed: the sentence for the user and the exit code."""

    text: str
    exit_code: int


@singledispatch
def failure_of(error: BaseException) -> Failure:
    """What to tell the user about an error."""
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    text = f"subquad made a mistake ({what}). Run the same command with --traceback and report what it prints."
    return Failure(text, MISTAKE)


@failure_of.register
def _(error: ValueError) -> Failure:
    return Failure(str(error), WRONG_USE)


@failure_of.register
def _(error: OSError) -> Failure:
    where = str(error.filename) if error.filename is not None else "the output"
    if error.errno == errno.ENOSPC:
        return Failure(
            f"cannot write {where}: the disk is full. Free some space, or name another folder with --output.", WRONG_USE
        )
    return Failure(f"cannot use {where}: {error.strerror or error}.", WRONG_USE)


@failure_of.register
def _(error: MemoryError) -> Failure:
    return Failure("memory ran out: choose a smaller preset, batch size or length.", WRONG_USE)


@failure_of.register
def _(error: ImportError) -> Failure:
    package = (error.name or "").partition(".")[0]
    extra = extra_of_module(package)
    if extra is None:
        return failure_of.dispatch(Exception)(error)
    return Failure(f"this command needs {package}: install it with pip install 'subquad[{extra}]'.", WRONG_USE)


@failure_of.register
def _(error: KeyboardInterrupt) -> Failure:
    return Failure("interrupted; what was finished is kept, run the same command again to continue", INTERRUPTED)


def print_failure(failure: Failure) -> None:
    """Print the sentence on standard error: in red and wrapped on a terminal, as one plain line elsewhere."""
    try:
        from rich.text import Text  # missing where the extra `cli` is not installed, which is then what is told

        from subquad.cli.console import BAD, progress_console
    except ImportError:
        sys.stderr.write(f"subquad: {failure.text}\n")
        return
    console, text = progress_console(), Text.assemble(("subquad: ", f"bold {BAD}"), (failure.text, BAD))
    console.print(text, soft_wrap=not console.is_terminal)
