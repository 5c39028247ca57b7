"""Linear layers whose outputs or inputs lie on several processes, and mixers made of them.

Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053, section 3. A mixer says by its `parting` which of its layers are
cut along their outputs (columns) and which along their inputs (rows). Between them each of the m processes has some
heads, or some hidden channels.

Cost a mixer: one sum of L D numbers over the m processes in the forward pass, and one in the backward pass.

Weights are DTensors, so that norms, checkpoints and `fully_shard` know what they are part of; products are of plain
tensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from subquad.interface import ChannelMixer, TokenMixer
from subquad.ops.projection import project
from subquad.parallel.collectives import enter_parts, sum_parts
from subquad.parallel.randomness import ApartDropout


class ColumnLinear(nn.Module):
    """Some outputs of a linear layer.

    Args:
        whole: the layer, equal on all processes.
        mesh: one dimension, of the processes that share it.
    """

    def __init__(self, whole: nn.Linear, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight = _part(whole.weight, mesh, 0)
        self.bias = None if whole.bias is None else _part(whole.bias, mesh, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N / m)."""
        return project(x, _local(self.weight), None if self.bias is None else _local(self.bias))


class RowLinear(nn.Module):
    """A linear layer of which each process has some inputs.

    Args:
        whole: the layer, equal on all processes.
        mesh: one dimension, of the processes that share it.
    """

    def __init__(self, whole: nn.Linear, mesh: DeviceMesh) -> None:
        super().__init__()
        self.group = mesh.get_group()
        self.weight = _part(whole.weight, mesh, 1)
        self.bias = whole.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., K / m) -> (..., N), on all processes."""
        y = sum_parts(project(x, _local(self.weight)), self.group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def part_mixer(mixer: TokenMixer | ChannelMixer, mesh: DeviceMesh) -> None:
    """Keep this process's part of a mixer.

    Args:
        mixer: with a `parting`, equal on all processes; changed in place.
        mesh: one dimension, of the processes that share the mixer.
    """
    parting = mixer.parting
    assert parting is not None
    for name in parting.columns:
        setattr(mixer, name, ColumnLinear(_linear(mixer, name), mesh))
    for name in parting.rows:
        setattr(mixer, name, RowLinear(_linear(mixer, name), mesh))
    for name in parting.between:
        dropout = mixer.get_submodule(name)
        assert isinstance(dropout, nn.Dropout)
        setattr(mixer, name, ApartDropout(dropout.p, mesh.get_local_rank()))
    group = mesh.get_group()

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(enter_parts(given, group) if isinstance(given, Tensor) else given for given in inputs)

    mixer.register_forward_pre_hook(enter)
    if isinstance(mixer, TokenMixer):
        mixer.dims = replace(mixer.dims, num_heads=mixer.dims.num_heads // mesh.size())


def _linear(mixer: nn.Module, name: str) -> nn.Linear:
    layer = mixer.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _part(whole: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(dim)], src_data_rank=None))


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local()
