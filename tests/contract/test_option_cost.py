"""The price of options that the default form of a mechanism doesn't show: as exact as that of the default."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from cases import WIDE_HEADS
from meter import counted_flops, differentiated, saved_bytes
from option_configs import CONFIGS

from subquad.build import build_from_config
from subquad.interface import MixerConfig

BY_CONFIG = pytest.mark.parametrize("config", CONFIGS, ids=repr)


@BY_CONFIG
@pytest.mark.parametrize("length", [1, 29, 64])
def test_flops_are_those_that_are_counted(config: MixerConfig, length: int) -> None:
    dims = replace(WIDE_HEADS, causal=config.traits.causal)
    mixer, x = build_from_config(config, dims), torch.randn(1, length, 24)
    assert config.cost(dims, length, 4).flops == counted_flops(lambda: mixer(x))


@BY_CONFIG
@pytest.mark.parametrize(("dtype", "dtype_bytes"), [(torch.float32, 4), (torch.float64, 8)])
@pytest.mark.parametrize("length", [1, 29, 64])
def test_activation_bytes_are_those_that_autograd_saves(
    config: MixerConfig, length: int, dtype: torch.dtype, dtype_bytes: int
) -> None:
    dims = replace(WIDE_HEADS, causal=config.traits.causal)
    mixer = build_from_config(config, dims).to(dtype)
    x = torch.randn(1, length, 24, dtype=dtype, requires_grad=True)
    assert config.cost(dims, length, dtype_bytes).activation_bytes == saved_bytes(
        mixer, lambda: differentiated(mixer(x))
    )


@BY_CONFIG
def test_parameters_are_those_of_the_module(config: MixerConfig) -> None:
    dims = replace(WIDE_HEADS, causal=config.traits.causal)
    module = build_from_config(config, dims)
    assert config.cost(dims, 10, 4).parameters == sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("config", [each for each in CONFIGS if each.traits.causal and each.traits.state], ids=repr)
def test_state_bytes_are_those_of_a_state_without_its_counters(config: MixerConfig) -> None:
    dims = replace(WIDE_HEADS, causal=True)
    mixer = build_from_config(config, dims)
    state = mixer(torch.randn(1, 40, 24), state=mixer.init_state(1)).state
    assert state is not None
    tensors = [getattr(state, field.name) for field in fields(state)]
    held = sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
    assert config.cost(dims, 40, 4).state_bytes == held


@pytest.mark.parametrize("config", [config for config in CONFIGS if config.traits.cross], ids=repr)
@pytest.mark.parametrize("context_length", [1, 21, 90])
def test_a_context_of_another_length_is_priced_as_exactly(config: MixerConfig, context_length: int) -> None:
    dims = replace(WIDE_HEADS, cross=True, context_length=context_length)
    mixer, x = build_from_config(config, dims), torch.randn(1, 29, 24, requires_grad=True)
    context = torch.randn(1, context_length, 24, requires_grad=True)
    price = config.cost(dims, 29, 4)
    assert price.flops == counted_flops(lambda: mixer(x, context))
    kept = saved_bytes(mixer, lambda: differentiated(mixer(x, context)))
    assert price.activation_bytes == kept - context.nbytes  # the model prices the context, once
