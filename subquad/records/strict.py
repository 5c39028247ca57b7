"""The base of every model that is read from or written to disk, and the field types they share."""

import math
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _finite_or_none(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


PathPart = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)]
Measurement = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Sample = Annotated[float, Field(gt=0)]
FiniteOrNone = Annotated[float | None, BeforeValidator(_finite_or_none)]


class Strict(BaseModel):
    """No coercion, no unknown field, no change, no NaN: a file is understood completely or refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
