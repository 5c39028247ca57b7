"""States in general: what `state_dataclass` makes of a class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from subquad import State, state_dataclass
from subquad.state import state_dtype


@state_dataclass
class Counted(State):
    """A state of a user's own mechanism."""

    sums: Tensor


def a_state() -> Counted:
    return Counted(torch.tensor([1, 2]), torch.tensor([[1.0], [2.0]]))


def test_a_users_state_is_a_pytree() -> None:
    leaves, spec = pytree.tree_flatten(a_state())
    assert len(leaves) == 2
    assert isinstance(pytree.tree_unflatten(leaves, spec), Counted)


def test_rows_bytes_and_dtypes() -> None:
    state = a_state()
    assert state.index_select(torch.tensor([1, 1])).sums.tolist() == [[2.0], [2.0]]
    assert state.nbytes == 2 * 8 + 2 * 4
    wide = state.to(dtype=torch.float64)
    assert (wide.sums.dtype, wide.length.dtype) == (torch.float64, torch.int64)
    assert state.to("meta").sums.device.type == "meta"


def test_selection_passes_gradients_and_detach_stops_them() -> None:
    sums = torch.ones(2, 1, requires_grad=True)
    state = Counted(torch.tensor([1, 2]), sums)
    state.index_select(torch.tensor([0, 0])).sums.sum().backward()
    assert sums.grad is not None
    assert sums.grad.tolist() == [[2.0], [0.0]]
    assert not state.detach().sums.requires_grad


def test_a_new_state_is_never_narrower_than_float32_unless_asked() -> None:
    assert state_dtype(torch.bfloat16, None) == torch.float32
    assert state_dtype(torch.float64, None) == torch.float64
    assert state_dtype(torch.float64, torch.bfloat16) == torch.bfloat16
