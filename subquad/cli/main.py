"""The console script `subquad`: runs a verb and turns whatever goes wrong into one sentence and an exit code.

Exit codes: 0 done; 1 a check failed, or a mistake of subquad's; 2 wrong use or wrong input; 130 interrupted. Nothing
beyond the standard library is imported before it is needed, so that a missing package is a sentence too.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence

from subquad.cli.errors import INTERRUPTED, MISTAKE, failure_of, print_failure

TRACEBACK = "--traceback"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: what follows the program's name; None for those of this process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    _tolerate_narrow_encodings()
    try:
        from subquad.cli.verbs import run_verb  # typer and rich come with the extra `cli`

        exit_code = run_verb([argument for argument in given if argument != TRACEBACK])
        if exit_code == INTERRUPTED:  # typer has caught the interrupt
            print_failure(failure_of(KeyboardInterrupt()))
        sys.stdout.flush()
        return exit_code
    except BrokenPipeError:  # the reader has seen enough, as in `subquad list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return MISTAKE
    except (Exception, KeyboardInterrupt) as error:
        if TRACEBACK in given:
            traceback.print_exc()
        failure = failure_of(error)
        print_failure(failure)
        return failure.exit_code


def _tolerate_narrow_encodings() -> None:
    """A character that the terminal can't show becomes "?" and ends no command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
