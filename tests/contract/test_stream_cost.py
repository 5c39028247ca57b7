"""The price of a mechanism with a global stream, whose options the default form doesn't show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import WIDE_HEADS
from meter import counted_flops, differentiated, saved_bytes

from subquad.build import build_from_config, mixer_config
from subquad.interface import MixerConfig

CONFIGS = [
    mixer_config(
        "bigbird",
        kind="etc",
        num_global=4,
        window=9,
        max_distance=max_distance,
        sharing=sharing,
        share_output=share_output,
    )
    for max_distance in (0, 3)
    for sharing, share_output in (("none", False), ("kv", False), ("kv", True), ("qkv", True))
]
BY_CONFIG = pytest.mark.parametrize("config", CONFIGS, ids=repr)


@BY_CONFIG
@pytest.mark.parametrize("length", [3, 36, 68, 100])
def test_flops_are_those_that_are_counted(config: MixerConfig, length: int) -> None:
    """Long tokens are whole blocks: queries that fill up a last block are not priced."""
    mixer, x = build_from_config(config, WIDE_HEADS), torch.randn(1, length, 24)
    assert config.cost(WIDE_HEADS, length, 4).flops == counted_flops(lambda: mixer(x))


@BY_CONFIG
@pytest.mark.parametrize(("dtype", "dtype_bytes"), [(torch.float32, 4), (torch.float64, 8), (torch.bfloat16, 2)])
@pytest.mark.parametrize("length", [1, 4, 5, 29, 64])
def test_activation_bytes_are_those_that_autograd_saves(
    config: MixerConfig, length: int, dtype: torch.dtype, dtype_bytes: int
) -> None:
    mixer = build_from_config(config, WIDE_HEADS).to(dtype)
    x = torch.randn(1, length, 24, dtype=dtype, requires_grad=True)
    assert config.cost(WIDE_HEADS, length, dtype_bytes).activation_bytes == saved_bytes(
        mixer, lambda: differentiated(mixer(x))
    )


@BY_CONFIG
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_those_of_the_module(config: MixerConfig, bias: bool) -> None:
    dims = replace(WIDE_HEADS, bias=bias)
    module = build_from_config(config, dims)
    assert config.cost(dims, 10, 4).parameters == sum(parameter.numel() for parameter in module.parameters())


@BY_CONFIG
def test_the_price_is_linear_in_the_length(config: MixerConfig) -> None:
    once, twice = (config.cost(WIDE_HEADS, length, 4) for length in (2**20, 2**21))
    assert twice.flops / once.flops == pytest.approx(2, rel=1e-4)
    assert twice.activation_bytes / once.activation_bytes == pytest.approx(2, rel=1e-4)
