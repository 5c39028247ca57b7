"""Config dataclasses and their written form: strict in both directions.

A config is a frozen, keyword-only dataclass of plain values. Its written form is a dict with the registered name first,
`{"name": "local", "window": 129}`, so that a config can be stored in JSON or TOML and read back to an equal object. An
unknown field, a missing required field or a value of another type raises; nothing is dropped and nothing is guessed.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

Config = TypeVar("Config")

COMMA = re.compile(r",(?![^\[]*\])")
"""A comma outside brackets, in a list written on a command line: some values are lists themselves."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name, if any is near, and all known names."""
    names = sorted(known)
    matches = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    listed = f"{', '.join(names) or 'none'}."
    return f"did you mean {matches[0]!r}? Known: {listed}" if matches else f"known: {listed}"


def read_value(text: str) -> Any:
    """A value as written on a command line: JSON where it is JSON, else a bare word, which is a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def read_options(owner: str, parts: Iterable[str]) -> dict[str, Any]:
    """Options as written behind colons in a mixer or a preset: "name=value" each.

    Args:
        owner: the whole text, for the message.
        parts: what stood between the colons.

    Raises:
        ValueError: a part of another form, or a name that is given twice.
    """
    options: dict[str, Any] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not (name and equals):
            raise ValueError(f"{owner!r}: expected options as name=value behind a colon, got {part!r}")
        if name in options:
            raise ValueError(f"{owner!r}: {name} is given twice")
        options[name] = read_value(value)
    return options


def write_option(name: str, value: Any) -> str:
    """An option as `read_options` reads it."""
    bare = isinstance(value, str) and read_value(value) == value
    return f"{name}={value if bare else json.dumps(value, separators=(',', ':'))}"


def field_names(config_class: type) -> list[str]:
    """Names of the options of a config class, in the order of their declaration."""
    return [field.name for field in dataclasses.fields(config_class)]


def make_config(config_class: type[Config], owner: str, options: Mapping[str, Any]) -> Config:
    """Build a config from options.

    Args:
        config_class: the frozen dataclass to build.
        owner: the registered name, for the message.
        options: option name to value.

    Raises:
        ValueError: an option that the class doesn't have, one that it requires and didn't get, or a wrong type.
    """
    known = field_names(config_class)
    for option in options:
        if option not in known:
            raise ValueError(f"{owner}: unknown option {option!r}; {nearest(option, known)}")
    for field in dataclasses.fields(config_class):  # pyright: ignore[reportArgumentType] - every config is a dataclass
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in options:
            raise ValueError(f"{owner}: option {field.name!r} is required and has no default")
    return config_class(**options)


def config_fields(config: Any) -> dict[str, Any]:
    """The options of a config as JSON-ready values; tuples become lists."""
    return {
        field.name: list(value) if isinstance(value := getattr(config, field.name), tuple) else value
        for field in dataclasses.fields(config)
    }


def coerce_fields(config: Any, owner: str) -> None:
    """Check every field of a frozen dataclass against its annotation; lists become tuples and ints become floats.

    Meant for `__post_init__`: JSON and TOML know no tuples, and write 1.0 as 1.

    Raises:
        ValueError: a value that doesn't fit, naming the field, the expected type and the value.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        fitted = _fit(value, hints[field.name])
        if fitted is _MISFIT:
            expected = _describe(hints[field.name])
            raise ValueError(f"{owner}: option {field.name!r} must be {expected}, got {value!r}")
        if fitted is not value:
            object.__setattr__(config, field.name, fitted)


def check_count(owner: str, name: str, count: object) -> None:
    """Check a whole number of at least 1.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
    """
    if type(count) is not int:  # exact, so that True is not an int
        raise ValueError(f"{owner}: {name} must be int, got {count!r}")
    if count < 1:
        raise ValueError(f"{owner}: {name} must be at least 1, got {count}")


_MISFIT = object()


def _fit(value: Any, hint: Any) -> Any:
    """`value` as the annotation wants it, or `_MISFIT`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        candidates = (_fit(value, argument) for argument in arguments)
        return next((fitted for fitted in candidates if fitted is not _MISFIT), _MISFIT)
    if origin is Literal:
        return value if value in arguments and type(value) in {type(choice) for choice in arguments} else _MISFIT
    if origin is tuple:
        return _fit_tuple(value, arguments)
    if hint is float and type(value) is int:
        return float(value)
    if hint is None or hint is type(None):
        return value if value is None else _MISFIT
    return value if type(value) is hint else _MISFIT  # exact, so that True is not an int


def _fit_tuple(value: Any, arguments: tuple[Any, ...]) -> Any:
    if type(value) not in (list, tuple):
        return _MISFIT
    items = tuple(_fit(item, arguments[0]) for item in value)  # tuple[X, ...] is the only form configs use
    if any(item is _MISFIT for item in items):
        return _MISFIT
    return value if type(value) is tuple and items == value else items


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin is tuple:
        return f"a list of {_describe(arguments[0])}"
    return "None" if hint in (None, type(None)) else hint.__name__
