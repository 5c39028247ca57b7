"""The buffers of some modules as one of their calls found them, given back to every later run of that call.

A module may change its buffers in a call (features drawn anew, running centroids), and others may call it before the
backward pass runs the first call again. What a call found is therefore kept with the call, not with the module: copies
of what the call changes, and by reference what it leaves as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


class _Buffer(NamedTuple):
    """A buffer as it stands: its owner, its name there, and its version, which counts changes in place."""

    owner: nn.Module
    name: str
    tensor: Tensor
    version: int

    def is_unchanged(self) -> bool:
        """Whether the owner has it, as it was."""
        return self.owner._buffers[self.name] is self.tensor and self.tensor._version == self.version


class CallBuffers:
    """Of one call.

    Args:
        modules: what the call runs.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._changed: list[_Buffer] = []
        self._unchanged: list[_Buffer] = []
        self._found: list[Tensor] | None = None

    def found(self) -> list[Tensor]:
        """Copies of the buffers that the first run changed, as it found them."""
        return self._found or []

    @contextmanager
    def record(self) -> Iterator[None]:
        """Run the call for the first time inside this block."""
        before = _buffers(self._modules)
        copies = [buffer.tensor.clone() for buffer in before]
        yield
        self._found = []
        for buffer, copy in zip(before, copies, strict=True):
            if buffer.is_unchanged():
                self._unchanged.append(buffer)
            else:
                self._changed.append(buffer)
                self._found.append(copy)

    @contextmanager
    def again(self, found: Sequence[Tensor]) -> Iterator[None]:
        """Run the call again inside this block, which leaves the buffers as they are.

        Args:
            found: what the method of this name returned.

        Raises:
            RuntimeError: a later call changed in place what this one only read.
        """
        for buffer in self._unchanged:
            if buffer.tensor._version != buffer.version:
                raise RuntimeError(
                    f"{type(buffer.owner).__name__}: buffer {buffer.name!r} was changed in place since the forward "
                    "pass that is computed again; call backward before, or give the module a new buffer instead"
                )
        buffers = [*self._changed, *self._unchanged]
        now = [buffer.owner._buffers[buffer.name] for buffer in buffers]
        tensors = [*(tensor.clone() for tensor in found), *(buffer.tensor for buffer in self._unchanged)]
        try:
            for buffer, tensor in zip(buffers, tensors, strict=True):
                buffer.owner._buffers[buffer.name] = tensor
            yield
        finally:
            for buffer, tensor in zip(buffers, now, strict=True):
                buffer.owner._buffers[buffer.name] = tensor

    @contextmanager
    def run(self) -> Iterator[None]:
        """Run the call inside this block, for the first time or again."""
        with self.record() if self._found is None else self.again(self._found):
            yield


def _buffers(modules: Sequence[nn.Module]) -> list[_Buffer]:
    owners = [owner for module in modules for owner in module.modules()]
    return [
        _Buffer(owner, name, tensor, tensor._version)
        for owner in owners
        for name, tensor in owner._buffers.items()
        if tensor is not None
    ]
