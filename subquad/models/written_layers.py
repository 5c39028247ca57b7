"""The layers of a stack as a config names them: one mixer for all, or a list that is repeated over the depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Written = str | Mapping[str, Any] | None
"""One layer's mixer: a name, or a dict with the name and options; None for none."""


def tiled(written: Any, depth: int, field: str) -> list[Written]:
    """What is written for each of `depth` layers, in the field of that name.

    Raises:
        ValueError: an empty list.
    """
    layers: Sequence[Written] = list(written) if isinstance(written, list | tuple) else [written]
    if not layers:
        raise ValueError(f"SubquadConfig: {field} is an empty list; name at least one")
    return [layers[index % len(layers)] for index in range(depth)]


def as_dict(written: Written, field: str) -> dict[str, Any]:
    """A name and options.

    Raises:
        ValueError: neither a name nor a dict.
    """
    if isinstance(written, str):
        return {"name": written}
    if isinstance(written, Mapping):
        return dict(written)
    raise ValueError(f"SubquadConfig: {field} must be a name, a dict with 'name', or a list of these; got {written!r}")
