"""Strict configs: every kind of field, both ways, with errors that say what to do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from subquad.config import (
    coerce_fields,
    config_fields,
    field_names,
    make_config,
    nearest,
    read_options,
    write_option,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """One field of every kind that configs use."""

    count: int
    rate: float = 0.5
    flag: bool = False
    word: str = "a"
    kind: Literal["x", "y", 3] = "x"
    maybe: int | None = None
    many: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check types."""
        coerce_fields(self, "mine")


def test_the_written_form_survives_json() -> None:
    options = Options(count=3, many=(1, 2), maybe=4, kind=3)
    written = json.loads(json.dumps(config_fields(options)))
    assert written["many"] == [1, 2]
    assert make_config(Options, "mine", written) == options
    assert field_names(Options) == ["count", "rate", "flag", "word", "kind", "maybe", "many"]


def test_json_integers_become_floats_and_lists_become_tuples() -> None:
    options = make_config(Options, "mine", {"count": 1, "rate": 1, "many": [1]})
    assert (options.rate, type(options.rate), options.many) == (1.0, float, (1,))
    assert hash(options)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("count", True, "int, got True"),
        ("count", 1.0, "int, got 1.0"),
        ("count", "1", "int, got '1'"),
        ("rate", "0.5", "float, got '0.5'"),
        ("rate", True, "float, got True"),
        ("flag", 1, "bool, got 1"),
        ("word", 1, "str, got 1"),
        ("kind", "z", "one of 'x', 'y', 3, got 'z'"),
        ("kind", True, "one of 'x', 'y', 3, got True"),
        ("kind", ["x"], r"one of 'x', 'y', 3, got \['x'\]"),
        ("maybe", "x", "int or None, got 'x'"),
        ("many", 3, "a list of int, got 3"),
        ("many", ["x"], r"a list of int, got \['x'\]"),
    ],
)
def test_a_wrong_type_is_refused_with_what_was_expected(field: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"^mine: option '{field}' must be {expected}$"):
        make_config(Options, "mine", {"count": 1, field: value})


def test_unknown_and_missing_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^mine: unknown option 'cuont'; did you mean 'count'\? Known: count, flag"):
        make_config(Options, "mine", {"cuont": 1})
    with pytest.raises(ValueError, match=r"^mine: option 'count' is required and has no default$"):
        make_config(Options, "mine", {})


def test_the_nearest_name_is_proposed_only_if_it_is_near() -> None:
    assert nearest("locl", ["full", "local"]) == "did you mean 'local'? Known: full, local."
    assert nearest("zzz", ["full", "local"]) == "known: full, local."
    assert nearest("zzz", []) == "known: none."


@pytest.mark.parametrize("value", [3, 1e-5, 0.1, True, None, "a", "true", "3", "", [2, 4], {"b": 1}])
def test_an_option_is_read_as_it_was_written(value: Any) -> None:
    assert read_options("mine", [write_option("rate", value)]) == {"rate": value}


def test_a_written_option_is_what_a_person_would_write() -> None:
    assert [write_option("x", value) for value in (1e-3, "cosine", True, (2, 4))] == [
        "x=0.001",
        "x=cosine",
        "x=true",
        "x=[2,4]",
    ]


def test_options_of_another_form_or_given_twice_are_refused() -> None:
    for part in ("rate", "=3", ""):
        with pytest.raises(ValueError, match=f"'mine': expected options as name=value behind a colon, got '{part}'"):
            read_options("mine", [part])
    with pytest.raises(ValueError, match="'mine': rate is given twice"):
        read_options("mine", ["rate=1", "rate=1"])
