"""A call that is run again finds the buffers that its first run found, and leaves those of its module alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from subquad.models.call_buffers import CallBuffers


class Alternating(nn.Module):
    """Changes one of its buffers, or neither, or fails having changed one."""

    replaced: Tensor
    changed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("changed", torch.zeros(2))

    def forward(self, step: str) -> Tensor:
        if step == "replace":
            self.replaced = self.replaced + 1
        if step == "change":
            self.changed.add_(1)
        if step == "fail":
            self.replaced = self.replaced + 1
            raise ValueError("broken off")
        return torch.cat((self.replaced, self.changed))


@pytest.mark.parametrize(
    ("step", "later"),
    [("replace", "replace"), ("change", "change"), ("read", "replace"), ("replace", "read"), ("change", "replace")],
)
def test_it_finds_what_it_found_after_later_calls(step: str, later: str) -> None:
    module = Alternating()
    module("replace")
    buffers = CallBuffers((module,))
    with buffers.run():
        first = module(step).clone()
    module(later)
    after = module("read")
    for _ in range(2):
        with buffers.run():
            assert torch.equal(module(step), first)
    assert torch.equal(module("read"), after)


def test_buffers_are_put_back_where_the_run_is_broken_off() -> None:
    module = Alternating()
    buffers = CallBuffers((module,))
    with buffers.run():
        module("replace")
    with pytest.raises(ValueError, match="broken off"), buffers.run():
        module("fail")
    assert torch.equal(module.replaced, torch.ones(2))


def test_a_later_change_in_place_of_what_the_call_only_read_is_refused() -> None:
    module = Alternating()
    buffers = CallBuffers((module,))
    with buffers.run():
        module("read")
    module("change")
    with pytest.raises(RuntimeError, match="Alternating: buffer 'changed' was changed in place"), buffers.run():
        module("read")
