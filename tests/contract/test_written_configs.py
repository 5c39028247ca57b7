"""A config's written form is strict in both directions, for every mechanism and channel mixer."""

from __future__ import annotations

import json
from dataclasses import MISSING, FrozenInstanceError, fields
from typing import Any, get_type_hints

import pytest

from subquad.interface import FeedforwardConfig, MixerConfig
from subquad.registry import FEEDFORWARDS, MIXERS

Config = MixerConfig | FeedforwardConfig
CLASSES = [pytest.param(config_class, id=name) for name, config_class in (*MIXERS.items(), *FEEDFORWARDS.items())]
BASE = {MIXERS.slot: MixerConfig, FEEDFORWARDS.slot: FeedforwardConfig}


def base_of(config_class: type[Config]) -> type[Config]:
    return BASE[config_class.registry.slot]


def other_values(config_class: type[Config]) -> dict[str, Any]:
    """Every option that is an integer and nothing else, with another value than its default."""
    config, types = config_class(), get_type_hints(config_class)
    return {field.name: getattr(config, field.name) + 2 for field in fields(config) if types[field.name] is int}


@pytest.mark.parametrize("config_class", CLASSES)
def test_a_config_survives_json(config_class: type[Config]) -> None:
    for options in ({}, other_values(config_class)):
        config = config_class(**options)
        written = json.loads(json.dumps(config.to_dict()))
        assert written["name"] == config_class.name
        assert base_of(config_class).from_dict(written) == config
        assert config_class.from_dict(written) == config


@pytest.mark.parametrize("config_class", CLASSES)
def test_absent_options_take_their_defaults(config_class: type[Config]) -> None:
    assert base_of(config_class).from_dict({"name": config_class.name}) == config_class()
    assert all(field.default is not MISSING or field.default_factory is not MISSING for field in fields(config_class))


@pytest.mark.parametrize("config_class", CLASSES)
def test_an_unknown_option_is_refused_and_the_known_are_named(config_class: type[Config]) -> None:
    known = ", ".join(sorted(field.name for field in fields(config_class))) or "none"
    with pytest.raises(ValueError, match=rf"^{config_class.name}: unknown option 'wnidow'; .*(known|Known): {known}\."):
        base_of(config_class).from_dict({"name": config_class.name, "wnidow": 3})


@pytest.mark.parametrize("value", [True, 3.5, "3", [3], None])
@pytest.mark.parametrize("config_class", CLASSES)
def test_an_integer_option_takes_integers_alone(config_class: type[Config], value: object) -> None:
    for option in other_values(config_class):
        with pytest.raises(ValueError, match=rf"option '{option}' must be int"):
            base_of(config_class).from_dict({"name": config_class.name, option: value})


@pytest.mark.parametrize("config_class", CLASSES)
def test_an_integer_option_has_a_lower_bound(config_class: type[Config]) -> None:
    for option in other_values(config_class):
        with pytest.raises(ValueError, match=rf"^{config_class.name}: .*{option}.* got -1"):
            config_class(**{option: -1})


@pytest.mark.parametrize("config_class", CLASSES)
def test_another_mechanisms_written_config_is_refused(config_class: type[Config]) -> None:
    for other in (MIXERS if config_class.registry is MIXERS else FEEDFORWARDS).items():
        if other[0] != config_class.name:
            with pytest.raises(ValueError, match=rf"^{config_class.name}: the written config is of '{other[0]}'"):
                config_class.from_dict({"name": other[0]})


@pytest.mark.parametrize("config_class", CLASSES)
def test_a_missing_or_unknown_name_is_refused(config_class: type[Config]) -> None:
    base = base_of(config_class)
    with pytest.raises(ValueError, match=r"needs its 'name', got \{\}"):
        base.from_dict({})
    with pytest.raises(ValueError, match="needs its 'name'"):
        base.from_dict({"name": 3})
    with pytest.raises(
        ValueError, match=rf"unknown .* mixer '{config_class.name}x'; did you mean '{config_class.name}'"
    ):
        base.from_dict({"name": f"{config_class.name}x"})


@pytest.mark.parametrize("config_class", CLASSES)
def test_configs_are_values(config_class: type[Config]) -> None:
    assert config_class() == config_class()
    assert hash(config_class()) == hash(config_class())
    assert all(
        config_class(**{option: value}) != config_class() for option, value in other_values(config_class).items()
    )
    for option in other_values(config_class):
        with pytest.raises(FrozenInstanceError):
            setattr(config_class(), option, 1)
