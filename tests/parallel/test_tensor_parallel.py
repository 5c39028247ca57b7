"""A mixer that says how it can be parted is the sum of its parts; what says nothing needn't be."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from processes import run_on
from torch import Tensor, nn

from subquad import Mask
from subquad.benchmark.probe_subject import miniature
from subquad.build import build_from_config, list_mixers, make_dims, mixer_config
from subquad.interface import ChannelMixer, Dims, FeedforwardConfig, TokenMixer
from subquad.layers.heads import BY_HEADS
from subquad.parallel.grid import MODEL, Grid, make_mesh
from subquad.parallel.randomness import ApartDropout
from subquad.parallel.tensor_parallel import part_mixer

DIMS = make_dims(embed_dim=12, num_heads=4, head_dim=6, max_length=40)
LENGTH = 37


def parted_cases() -> Iterator[tuple[str, bool, str]]:
    """Every mechanism with a parting, in its bidirectional and its causal form, with all positions that it takes."""
    for causal, positions in itertools.product((False, True), ("none", "rotary")):
        for name in list_mixers(**{"causal" if causal else "bidirectional": True}):
            try:
                mixer = build(name, circumstances(causal, positions))
            except ValueError:  # it has positions of its own
                continue
            if mixer.parting is not None:
                yield name, causal, positions


def circumstances(causal: bool, positions: Any) -> Dims:
    return replace(DIMS, causal=causal, positions=positions)


def build(name: str, dims: Dims) -> TokenMixer:
    """Small, random biases, equal wherever it is called; without what is beside the projections."""
    torch.manual_seed(0)
    config = miniature(mixer_config(name))
    if name == "nystromformer":
        config = replace(config, kernel=0)  # pyright: ignore[reportCallIssue] - an option of this mechanism
    mixer = build_from_config(config, dims).double().train()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer


def part_of(mixer: TokenMixer, name: str, rank: int, parts: int) -> TokenMixer:
    """A smaller mixer with some heads of a mixer; the first has the bias of the sum."""
    part = build(name, replace(mixer.dims, num_heads=mixer.dims.num_heads // parts))
    for layer in BY_HEADS.columns:
        own = dict(part.get_submodule(layer).named_parameters())
        for kind, theirs in mixer.get_submodule(layer).named_parameters():
            own[kind].data.copy_(theirs.chunk(parts, dim=0)[rank])
    for layer in BY_HEADS.rows:
        theirs, own = mixer.get_submodule(layer), part.get_submodule(layer)
        own.get_parameter("weight").data.copy_(theirs.get_parameter("weight").chunk(parts, dim=1)[rank])
        own.get_parameter("bias").data.copy_(theirs.get_parameter("bias") * (rank == 0))
    return part


def results(name: str, dims: Dims) -> tuple[Tensor, Tensor]:
    """The sum of four parts with one head each, and the result of all four heads."""
    mixer = build(name, dims)
    x = torch.randn(2, LENGTH, 12, dtype=torch.float64)
    mask = Mask.from_lengths([LENGTH, 20], LENGTH) if mixer.config.traits.padding else None
    parts = [part_of(mixer, name, rank, 4)(x, mask=mask).y for rank in range(4)]
    return torch.stack(parts).sum(dim=0), mixer(x, mask=mask).y


@pytest.mark.parametrize(("name", "causal", "positions"), list(parted_cases()))
def test_a_parted_mixer_is_the_sum_of_its_heads(name: str, causal: bool, positions: str) -> None:
    total, whole = results(name, circumstances(causal, positions))
    torch.testing.assert_close(total, whole, rtol=1e-9, atol=1e-9)


def test_one_whose_heads_differ_is_not() -> None:
    total, whole = results("bigbird", circumstances(False, "none"))
    assert not torch.allclose(total, whole, rtol=1e-2, atol=1e-2)


def test_the_usual_mechanisms_can_be_parted() -> None:
    assert {"full", "local", "linear"} <= {name for name, _, _ in parted_cases()}


def one_layer(kind: str, name: str) -> TokenMixer | ChannelMixer:
    if kind == "token":
        return build(name, replace(DIMS, causal=True))
    torch.manual_seed(0)
    return FeedforwardConfig.from_dict({"name": name, "hidden_dim": 8, "dropout": 0.0}).build(12).double()


def step_of(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x).y
    (y * y.detach().sin()).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def parted_step(kind: str, name: str) -> tuple[Tensor, Tensor]:
    mesh = make_mesh(Grid(1, 2))
    layer = one_layer(kind, name)
    part_mixer(layer, mesh[MODEL])
    return step_of(layer, inputs())


def inputs() -> Tensor:
    return torch.randn(2, LENGTH, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("token", "full"),
        ("token", "local"),
        ("channel", "mlp"),
        ("channel", "glu"),
    ],
)
def test_two_processes_give_the_whole_result_and_gradient(kind: str, name: str) -> None:
    expected = step_of(one_layer(kind, name), inputs())
    for found in run_on(2, parted_step, kind, name):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def drawn(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    return function(torch.ones(1000)), torch.rand(4)


def test_channels_on_different_processes_are_dropped_apart_and_the_generator_goes_on_alike() -> None:
    (first, after_first), (second, after_second) = (drawn(ApartDropout(0.5, rank)) for rank in range(2))
    assert {0.0, 2.0} == set(first.tolist()) == set(second.tolist())
    assert 300 < int((first != second).sum()) < 700
    assert torch.equal(after_first, after_second)
    assert torch.equal(drawn(ApartDropout(0.5, 0).eval())[0], torch.ones(1000))
