"""The functions a user calls: names to modules, traits, prices, and errors that say what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import subquad
from subquad import Traits
from subquad.build import build_feedforward, build_mixer, cost, list_mixers, traits
from subquad.interface import TRAIT_NAMES

SIZES: dict[str, Any] = {"embed_dim": 8, "num_heads": 2}


def test_a_mixer_is_called_as_the_contract_says() -> None:
    mixer = subquad.build_mixer("local", embed_dim=64, num_heads=4, causal=True, window=9)
    y, state, aux_loss = mixer(torch.randn(2, 33, 64))
    assert y.shape == (2, 33, 64)
    assert state is None
    assert aux_loss is None


def test_head_dim_is_free() -> None:
    assert build_mixer("full", embed_dim=10, num_heads=3, head_dim=4)(torch.randn(1, 2, 10)).y.shape == (1, 2, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 10, "num_heads": 3}, "embed_dim=10 is not divisible by num_heads=3; .* or pass head_dim"),
        ({"embed_dim": 10, "num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"embed_dim": 0, "num_heads": 2}, "embed_dim must be at least 1, got 0"),
        ({**SIZES, "head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({**SIZES, "max_length": 0}, "max_length must be at least 1, got 0"),
        ({**SIZES, "dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({**SIZES, "dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
        ({**SIZES, "causal": 1}, "option 'causal' must be bool, got 1"),
        ({**SIZES, "positions": "sinusoidal"}, "option 'positions' must be one of 'none', 'rotary', got 'sinusoidal'"),
        ({"embed_dim": "8", "num_heads": 2}, "build_mixer: embed_dim must be int, got '8'"),
        ({"embed_dim": 8, "num_heads": 2.0}, "build_mixer: num_heads must be int, got 2.0"),
        ({**SIZES, "windw": 3}, "full: unknown option 'windw'; known: none"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_built(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer("full", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": "512"}, "embed_dim must be int, got '512'"),
        ({"embed_dim": 10, "num_heads": 3}, "embed_dim=10 is not divisible by num_heads=3"),
        ({"length": "8"}, "length must be int, got '8'"),
        ({"dtype_bytes": 0}, "dtype_bytes must be at least 1, got 0"),
        ({"max_length": True}, "option 'max_length' must be int or None, got True"),
        ({"causal": True, "cross": True}, "cross=True excludes causal=True"),
    ],
)
def test_a_refused_price_names_the_function_that_was_called(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^cost: {message}"):
        cost("full", **{"length": 8, **SIZES, **arguments})


@pytest.mark.parametrize(("width", "message"), [("512", "must be int, got '512'"), (0, "must be at least 1, got 0")])
def test_a_refused_feedforward_names_the_function_that_was_called(width: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^build_feedforward: embed_dim {message}"):
        build_feedforward("mlp", embed_dim=width)


def test_an_unknown_mechanism_proposes_the_nearest() -> None:
    for ask in (lambda: build_mixer("ful", **SIZES), lambda: traits("ful"), lambda: cost("ful", length=1, **SIZES)):
        with pytest.raises(ValueError, match="unknown token mixer 'ful'; did you mean 'full'"):
            ask()
    with pytest.raises(ValueError, match="unknown channel mixer 'mpl'; did you mean 'mlp'"):
        build_feedforward("mpl", embed_dim=8)


def test_mixers_are_listed_by_traits() -> None:
    assert list_mixers() == sorted(list_mixers())
    for trait in TRAIT_NAMES:
        having, lacking = list_mixers(**{trait: True}), list_mixers(**{trait: False})
        assert sorted(having + lacking) == list_mixers()
        assert all(getattr(traits(name), trait) for name in having)
    assert set(list_mixers(causal=True, state=True)) == set(list_mixers(causal=True)) & set(list_mixers(state=True))


def test_an_unknown_trait_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown trait 'casual'; did you mean 'causal'"):
        list_mixers(casual=True)


def test_traits_are_those_of_the_options() -> None:
    assert isinstance(traits("local", window=9), Traits)
    with pytest.raises(ValueError, match="local: unknown option 'rank'"):
        traits("local", rank=9)


def test_a_price_needs_no_module() -> None:
    price = cost("full", length=10, causal=True, **SIZES)
    assert price.flops == 4 * 2 * 10 * 64 + 4 * 55 * 8
    assert price.parameters == 4 * 64 + 4 * 8
    assert price.state_bytes == 2 * 10 * 8 * 4
    assert cost("full", length=10, dtype_bytes=2, **SIZES).activation_bytes < price.activation_bytes


def test_the_price_of_a_cross_mixer_counts_its_context() -> None:
    price = cost("full", length=10, cross=True, context_length=30, **SIZES)
    assert price.flops == 2 * 2 * (10 + 30) * 64 + 4 * 10 * 30 * 8
    assert price.state_bytes == 2 * 30 * 8 * 4
    as_long = cost("full", length=10, cross=True, context_length=10, **SIZES)
    assert cost("full", length=10, cross=True, **SIZES) == as_long


def test_a_price_is_refused_like_a_module() -> None:
    for none in (0, -1):
        with pytest.raises(ValueError, match=f"length must be at least 1, got {none}"):
            cost("full", length=none, **SIZES)
    with pytest.raises(ValueError, match="linformer: causal=True is not supported"):
        cost("linformer", length=4, causal=True, **SIZES)
    with pytest.raises(ValueError, match="pass max_length"):
        cost("linformer", length=4, **SIZES)
    with pytest.raises(ValueError, match="linformer: length 5 exceeds max_length=4"):
        cost("linformer", length=5, max_length=4, **SIZES)
    with pytest.raises(ValueError, match="linformer: length 6 exceeds max_length=4"):
        cost("linformer", length=3, max_length=4, cross=True, context_length=6, **SIZES)
    with pytest.raises(ValueError, match="local: cross=True is not supported"):
        cost("local", length=3, cross=True, **SIZES)
    for length, cross in ((5, False), (-1, True)):
        with pytest.raises(ValueError, match=f"context_length is the number .* got {length} with cross={cross}"):
            cost("full", length=3, cross=cross, context_length=length, **SIZES)


def test_a_feedforward_needs_a_width() -> None:
    with pytest.raises(ValueError, match="embed_dim must be at least 1, got 0"):
        build_feedforward("mlp", embed_dim=0)


def test_building_on_the_meta_device_allocates_nothing() -> None:
    with torch.device("meta"):
        mixers = [build_mixer(name, max_length=16, **SIZES) for name in list_mixers(bidirectional=True)]
    assert all(parameter.is_meta for mixer in mixers for parameter in mixer.parameters())
