"""Buffers that stay float32 or wider whatever their module is cast to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from subquad.layers.wide_buffers import WideBuffers

FINE = 1 + 2.0**-20
"""A number that 16 bits can't hold."""


class Averages(WideBuffers):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), FINE))
        self.register_buffer("mean", torch.full((2,), FINE))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("absent", None)


@pytest.mark.parametrize(
    "narrowed",
    [nn.Module.bfloat16, nn.Module.half, lambda module: module.to("cpu", torch.bfloat16)],
)
def test_a_narrowing_cast_rounds_parameters_alone(narrowed: Callable[[nn.Module], nn.Module]) -> None:
    module = Averages()
    narrowed(nn.Sequential(module))
    assert module.weight.dtype.itemsize == 2
    assert torch.equal(module.get_buffer("mean"), torch.full((2,), FINE, dtype=torch.float32))
    assert module.get_buffer("calls").dtype == torch.int64


def test_float64_is_cast_to_and_from() -> None:
    module = Averages().double()
    assert module.get_buffer("mean").dtype == torch.float64
    assert module.bfloat16().get_buffer("mean").dtype == torch.float32


def test_a_cast_may_change_the_device_too() -> None:
    mean = Averages().to("meta", torch.bfloat16).get_buffer("mean")
    assert (mean.device.type, mean.dtype) == ("meta", torch.float32)
    mean = Averages().to("meta", torch.bfloat16).to_empty(device="cpu").get_buffer("mean")
    assert (mean.device.type, mean.dtype) == ("cpu", torch.float32)
