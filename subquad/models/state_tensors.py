"""States of a stack as named tensors and back: what safetensors can write, and nothing that has to be unpickled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

from torch import Tensor, nn

from subquad.models.block import LayerStates, layers_of
from subquad.state import State


def state_tensors(states: Sequence[LayerStates]) -> dict[str, Tensor]:
    """Copies of all tensors, named `layers.<index>.own.<field>` or `layers.<index>.cross.<field>`."""
    return {
        f"{prefix}.{field.name}": getattr(state, field.name).detach().clone().contiguous()
        for index, layer in enumerate(states)
        for prefix, state in _named(index, layer)
        for field in fields(state)
    }


def states_of_tensors(blocks: nn.ModuleList, tensors: Mapping[str, Tensor]) -> list[LayerStates]:
    """The states that a stack of these blocks has written, on the device of the blocks.

    Raises:
        ValueError: tensors that are missing or that these blocks don't have.
    """
    fresh = [layer.init_states(1) for layer in layers_of(blocks)]
    expected = state_tensors(fresh).keys()
    if expected != tensors.keys():
        missing, unknown = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
        raise ValueError(
            f"the states were written by another model: {len(missing)} tensors are missing {missing[:3]}, and "
            f"{len(unknown)} are unknown {unknown[:3]}"
        )
    read = []
    for index, layer in enumerate(fresh):
        of_layer = [_filled(state, prefix, tensors) for prefix, state in _named(index, layer)]
        read.append(LayerStates(*of_layer))
    return read


def _named(index: int, layer: LayerStates) -> list[tuple[str, State]]:
    slots = (("own", layer.own), ("cross", layer.cross))
    return [(f"layers.{index}.{slot}", state) for slot, state in slots if state is not None]


def _filled(fresh: State, prefix: str, tensors: Mapping[str, Tensor]) -> State:
    device = fresh.length.device
    return replace(fresh, **{field.name: tensors[f"{prefix}.{field.name}"].to(device) for field in fields(fresh)})
