"""A user's own mechanism joins by one decorator; names are checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

import subquad
from subquad import Cost, Dims, FeedforwardConfig, MixerConfig, TokenMixer, Traits
from subquad.build import build_mixer, list_mixers
from subquad.mechanisms.full import Full
from subquad.registry import MIXERS, Registry, default_name, register


@dataclass(frozen=True, kw_only=True)
class TwoFacedConfig(MixerConfig):
    """A mechanism outside the library."""

    width: int = 3

    @property
    def traits(self) -> Traits:
        return Traits(bidirectional=True)

    def build(self, dims: Dims) -> TokenMixer:
        return Full(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        return Cost()


@pytest.fixture
def registered() -> Iterator[type[TwoFacedConfig]]:
    yield register(TwoFacedConfig)
    MIXERS.remove("two_faced")
    TwoFacedConfig.name = "unregistered"


def test_a_class_is_registered_under_its_own_name_in_snake_case(registered: type[TwoFacedConfig]) -> None:
    assert registered.name == "two_faced"
    assert "two_faced" in list_mixers()
    assert "two_faced" in list_mixers(bidirectional=True)
    assert "two_faced" not in list_mixers(causal=True)
    assert isinstance(build_mixer("two_faced", embed_dim=8, num_heads=2, width=5).config, TwoFacedConfig)
    assert MixerConfig.from_dict({"name": "two_faced", "width": 9}) == TwoFacedConfig(width=9)


def test_the_errors_of_others_name_it_too(registered: type[TwoFacedConfig]) -> None:
    with pytest.raises(ValueError, match=r"known: .*two_faced"):
        build_mixer("nothing_like_it", embed_dim=8, num_heads=2)


def test_a_name_can_be_given_and_a_class_defined_again_in_a_notebook(registered: type[TwoFacedConfig]) -> None:
    assert subquad.register("two_faced")(TwoFacedConfig) is TwoFacedConfig


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the name 'full' is taken by subquad\.mechanisms\.full\.FullConfig"):
        register("full")(TwoFacedConfig)
    assert TwoFacedConfig.name == "unregistered"


@pytest.mark.parametrize("name", ["", "Two", "2x", "two-faced", "two faced"])
def test_a_name_must_be_an_identifier(name: str) -> None:
    with pytest.raises(ValueError, match="a token mixer's name must be snake_case letters, digits and underscores"):
        register(name)(TwoFacedConfig)


def test_a_class_that_is_no_config_is_refused() -> None:
    with pytest.raises(ValueError, match="can't be registered: derive it from MixerConfig or FeedforwardConfig"):
        register("thing")(int)


def test_channel_mixers_have_a_registry_of_their_own() -> None:
    assert FeedforwardConfig.registry is not MixerConfig.registry
    assert "mlp" in subquad.list_feedforwards()
    assert "mlp" not in list_mixers()


def test_an_unknown_name_proposes_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown token mixer 'longfromer'; did you mean 'longformer'"):
        MIXERS.lookup("longfromer")


def test_names_are_listed_in_alphabetical_order() -> None:
    registry: Registry[type] = Registry("thing")
    for name in ("b", "a", "c"):
        registry.add(name, type(name, (), {}))
    assert [name for name, _ in registry.items()] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "expected"), [("LocalConfig", "local"), ("MyOwnConfig", "my_own"), ("Plain", "plain")]
)
def test_default_names(name: str, expected: str) -> None:
    assert default_name(type(name, (), {})) == expected
