"""A forward pass inside a backward pass is told from one of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.ops.backward_pass import is_recomputing


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_recomputed_in_the_backward_pass_alone(reentrant: bool) -> None:
    found = []

    def forward(x: Tensor) -> Tensor:
        found.append(is_recomputing())
        return x.exp()

    x = torch.ones(2, requires_grad=True)
    y = checkpoint(forward, x, use_reentrant=reentrant)
    assert isinstance(y, Tensor)
    y.sum().backward()
    assert found == [False, True]
    assert not is_recomputing()
