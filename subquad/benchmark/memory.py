"""Memory, three ways: what autograd keeps for the backward pass, what tensors hold at once, the peak of a process.

Saved bytes are deterministic and the same on every machine: unique storages, parameters not included. So is the most
that torch's allocator holds on the CPU. The peak of a process is what an operating system would have to provide; it is
taken in a fresh one, from the high-water mark of its resident set (Linux) or of the CUDA allocator, less what was there
before. On the CPU it includes what the C library keeps of freed blocks.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd keeps after `forward`, those of `parameters` left out."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        result = forward()  # kept until the count is done, so that no storage is freed and its address used again
    total = sum(storages.values())
    del result
    return total


def allocated_peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator held at once during `call`, beyond those at its start."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    recorded: Any = profile.profiler  # torch's stubs don't know the events of memory
    changes = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    return max(held, default=0)


class PeakMemory:
    """The growth of this process's peak memory since `start`, in bytes; None where the system doesn't tell."""

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._before = torch.cuda.memory_allocated() if self._cuda else _status_bytes("VmRSS")

    def restart(self) -> None:
        """Forget the peak so far; the starting point stays."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            self._before = None

    def bytes(self) -> int | None:
        """Peak since the last `restart`, less what was in use at the start."""
        now = torch.cuda.max_memory_allocated() if self._cuda else _status_bytes("VmHWM")
        return None if now is None or self._before is None else max(0, now - self._before)


def resident_bytes() -> int | None:
    """What this process holds now, shared libraries included; None where the system doesn't tell."""
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s*(\d+) kB$", status, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024
