import sys
from dataclasses import asdict, dataclass, fields, make_dataclass
from types import ModuleType
from typing import ClassVar

import pytest

from subquad.benchmark.mechanism_card import (
    OWN,
    OptionCard,
    describe_options,
    draw_pictures,
    mechanism_card,
    read_documentation,
)
from subquad.benchmark.probes import ProbeResult
from subquad.build import list_mixers, mixer_config
from subquad.interface import Traits
from subquad.mechanisms.local import LocalConfig
from subquad.records.mechanisms import Mechanisms
from subquad.registry import MIXERS

CITED = """Near: attention to few tokens.

A. Author et al. 2020, "Near Attention",
arXiv:2001.01234, section 3.

    y = softmax(q kᵀ)

    z = y

Cost O(L) time.

Departures: none that
matter.
"""


@dataclass(frozen=True, kw_only=True)
class UndocumentedConfig(LocalConfig):
    family: ClassVar[str] = "sparse"
    name: ClassVar[str] = "undocumented"


@dataclass(frozen=True, kw_only=True)
class OwnConfig(LocalConfig):
    """Attention to the nearest tokens,
    and to no others.

    More of it.
    """

    name: ClassVar[str] = "own"
    reach: int
    """How far
    a token looks."""
    plain: tuple[int, ...] = (1, 2)


@pytest.mark.parametrize("name", list_mixers())
def test_every_mechanism_has_a_card_with_paper_formula_and_pictures(name: str) -> None:
    config = mixer_config(name)
    card = mechanism_card(config, length=6)
    assert card.name == name
    assert "arXiv:" in card.paper
    assert card.formula.strip()
    assert card.formula == card.formula.strip("\n")
    assert not card.summary.lower().startswith(f"{name}:")
    assert card.summary[0] == card.summary[0].upper()
    assert card.traits == asdict(config.traits)
    assert (card.picture is not None) == config.traits.bidirectional
    assert (card.causal_picture is not None) == config.traits.causal
    assert Mechanisms.model_validate_json(Mechanisms(mechanisms=(card,)).model_dump_json()).mechanisms == (card,)


@pytest.mark.parametrize("name", list_mixers())
def test_every_option_of_every_mechanism_is_described(name: str) -> None:
    config_class = MIXERS.lookup(name)
    described = describe_options(config_class)
    assert [option.name for option in described] == [field.name for field in fields(config_class)]
    assert all(option.description and option.type for option in described)


def test_probes_are_named_with_their_form_and_keep_their_detail_and_their_time() -> None:
    result = ProbeResult(name="no future leak", passed=False, detail="y[3] saw x[9]", seconds=0.1)
    card = mechanism_card(mixer_config("local"), [("causal", result)], length=4)
    (probe,) = card.red_probes
    assert (probe.name, probe.detail, probe.seconds) == ("no future leak (causal)", "y[3] saw x[9]", 0.1)


def test_the_parts_of_a_docstring_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("near_mechanism", CITED)
    monkeypatch.setitem(sys.modules, "near_mechanism", module)
    monkeypatch.setattr(OwnConfig, "__module__", "near_mechanism")
    found = read_documentation(OwnConfig)
    assert found.summary == "Attention to few tokens."
    assert found.paper == 'A. Author et al. 2020, "Near Attention", arXiv:2001.01234, section 3.'
    assert found.formula == "y = softmax(q kᵀ)\n\nz = y"
    assert found.cost == "Cost O(L) time."
    assert found.departures == "None that matter."


def test_a_mechanism_of_the_users_own_is_described_by_its_class() -> None:
    found = read_documentation(OwnConfig)
    assert found.summary == "Attention to the nearest tokens, and to no others."
    assert found.paper == OWN == "user's own mechanism"
    assert found.formula == ""


def test_a_mechanism_without_any_docstring_has_a_card_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_documentation(UndocumentedConfig).summary == "User's own mechanism."
    monkeypatch.setattr(UndocumentedConfig, "__module__", "not_loaded")
    assert mechanism_card(UndocumentedConfig(), length=4).paper == OWN


def test_options_tell_type_default_and_description() -> None:
    options = {option.name: option for option in describe_options(OwnConfig)}
    window, reach, plain = options["window"], options["reach"], options["plain"]
    assert window == OptionCard(
        "window",
        "int",
        129,
        False,
        "W, keys that a token sees in a sliding window, itself included; odd unless causal.",
    )
    assert reach == OptionCard("reach", "int", None, True, "How far a token looks.")
    assert plain == OptionCard("plain", "tuple[int, ...]", (1, 2), False, "")


def test_options_without_a_source_keep_names_and_defaults() -> None:
    made = make_dataclass("Made", [("window", int, 3)])
    assert describe_options(made) == (OptionCard("window", "", 3, False, ""),)


def test_traits_are_described_too() -> None:
    assert all(trait.description for trait in describe_options(Traits))


def test_sizes_are_made_small_in_pictures_unless_they_are_to_be_kept() -> None:
    small, _ = draw_pictures(mixer_config("local"), length=12)
    kept, _ = draw_pictures(mixer_config("local"), length=12, keep=["window"])
    assert small is not None
    assert kept is not None
    assert small.rows[0] == "111000000000"
    assert kept.rows == ("1" * 12,) * 12


def test_a_form_that_goes_not_with_the_options_has_no_picture() -> None:
    bidirectional, causal = draw_pictures(mixer_config("local", window=4), length=6)
    assert bidirectional is None
    assert causal is not None
    assert causal.rows[5] == "001111"


@pytest.mark.parametrize("length", [0, 513])
def test_a_picture_too_small_or_too_large_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"a picture of who attends whom has 1 to 512 tokens, got {length}"):
        draw_pictures(mixer_config("local"), length=length)
