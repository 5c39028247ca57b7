"""What a command left behind when a test ran it."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple


class Ran(NamedTuple):
    """Exit code, standard output and standard error."""

    exit_code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The JSON document on standard output; fails if there is anything else."""
        return json.loads(self.out)


Invoke = Callable[..., Ran]
