"""State: what a causal mixer carries from one call to the next, as a value.

A state goes into a call and a new one comes out; the one that went in is never modified, so a stream can be forked,
stored and resumed by keeping a reference. Every tensor in it is batch-first, which makes beam search a row selection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeVar, dataclass_transform

import torch
from torch import Tensor
from torch.export import register_dataclass


@dataclass(frozen=True)
class State:
    """Base of all states.

    Attributes:
        length: int64 (B,), the number of valid tokens seen so far by each row.
    """

    length: Tensor

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        tensors = {field.name: change(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **tensors)

    def index_select(self, rows: Tensor) -> Self:
        """The state of the given rows (int64, (R,)), in that order and with repetitions: beam search."""
        return self._map(lambda tensor: tensor.index_select(0, rows))

    def detach(self) -> Self:
        """The same values, cut off from the graph that made them."""
        return self._map(lambda tensor: tensor.detach())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move to a device, and change the dtype of the floating-point tensors (lengths stay integers)."""
        return self._map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(getattr(self, field.name).nbytes for field in dataclasses.fields(self))


StateClass = TypeVar("StateClass", bound=type[State])


@dataclass_transform(frozen_default=True)
def state_dataclass(state_class: StateClass) -> StateClass:
    """Make a subclass of `State` a frozen dataclass and a pytree; all its fields are tensors with the batch first."""
    frozen = dataclass(frozen=True)(state_class)
    register_dataclass(frozen)
    return frozen


def state_dtype(parameter_dtype: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a new state: as asked, else the parameters', float32 where that is narrower."""
    return dtype if dtype is not None else torch.promote_types(parameter_dtype, torch.float32)
