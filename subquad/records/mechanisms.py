"""What is known of each mechanism, as `compare`, `run` and `sweep` write it to `mechanisms.json` beside the records.

The report reads this file instead of the registry, and so needs neither torch nor the code of a user's own mechanism.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from subquad.drawing import LONGEST
from subquad.records.schema import ProbeRecord
from subquad.records.strict import Strict

MECHANISMS_FILE = "mechanisms.json"


class Picture(Strict):
    """Who attends whom: `length` rows of "0" and "1", row i the query, character j the key, "1" where i sees j."""

    length: Annotated[int, Field(ge=1, le=LONGEST)]
    rows: tuple[str, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.rows) != self.length or not all(
            re.fullmatch(f"[01]{{{self.length}}}", row, re.ASCII) for row in self.rows
        ):
            raise ValueError(f'expected {self.length} rows of {self.length} characters "0" or "1"')
        return self


class Mechanism(Strict):
    """One mechanism: what it is, where it is from, what it can do and what was proved of it."""

    name: str
    family: str
    summary: str
    paper: str
    formula: str
    traits: dict[str, bool]
    probes: tuple[ProbeRecord, ...] = ()
    picture: Picture | None = None
    causal_picture: Picture | None = None

    @property
    def red_probes(self) -> tuple[ProbeRecord, ...]:
        """The proofs that failed."""
        return tuple(probe for probe in self.probes if not probe.passed)


class Mechanisms(Strict):
    """The content of `mechanisms.json`."""

    schema_version: Literal[1] = 1
    mechanisms: tuple[Mechanism, ...] = ()
