"""The price of options that the default form of a mechanism doesn't show: as exact as that of the default."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import WIDE_HEADS
from meter import counted_flops, saved_bytes

from subquad.build import build_from_config, mixer_config
from subquad.interface import MixerConfig

CONFIGS = [
    *(mixer_config("ngram", n=n) for n in (1, 2)),
    *(mixer_config("streaming", sinks=sinks, window=5, learned_sink=True) for sinks in (0, 4)),
    *(
        mixer_config("star", steps=steps, norm=norm, boundary=boundary, start=start, share_steps=steps == 3)
        for steps, norm in product((1, 3), ("post", "pre_official"))
        for boundary, start in (("zero_key", "token"), ("mask", "mean"), ("ring", "padded_mean"))
    ),
    *(
        mixer_config("sparse_transformer", kind=kind, stride=7, summary=3, combine=combine, summary_per_head=True)
        for kind, combine in product(("strided", "fixed"), ("merged", "local", "summary", "heads"))
    ),
    *(mixer_config("linear", chunk=chunk) for chunk in (1, 5, 100)),
    *(
        mixer_config("performer", kernel=kernel, features=10, chunk=chunk, redraw=1)
        for kernel, chunk in product(("positive", "hyperbolic", "trigonometric", "relu"), (5, 64))
    ),
    *(
        mixer_config("logsparse", local=local, restart=restart, kernel=kernel)
        for local, restart, kernel in ((4, None, 1), (3, 16, 5), (1, 7, 2))
    ),
]
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
    assert config.cost(dims, length, dtype_bytes).activation_bytes == saved_bytes(mixer, lambda: mixer(x).y)


@BY_CONFIG
def test_parameters_are_those_of_the_module(config: MixerConfig) -> None:
    dims = replace(WIDE_HEADS, causal=config.traits.causal)
    module = build_from_config(config, dims)
    assert config.cost(dims, 10, 4).parameters == sum(parameter.numel() for parameter in module.parameters())
