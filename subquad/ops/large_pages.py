"""Large tensors in large pages of memory.

The C library takes every block beyond 32 MiB from the system anew. In pages of 4 KiB the first writing to each of them
takes two to ten times as long as the writing itself; in pages of 2 MiB it is hardly noticed. Linux gives them to those
who ask for them, which torch doesn't.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

LEAST_BYTES = 2**25
"""Smaller blocks are reused by the C library, already with pages."""

Advise = Callable[[ctypes.c_void_p, ctypes.c_size_t, int], int]


def empty_like(x: Tensor) -> Tensor:
    """`torch.empty_like`."""
    made = torch.empty_like(x)
    if type(made) is Tensor and made.device.type == "cpu" and made.nbytes >= LEAST_BYTES:  # no stand-in of a compiler
        _ask_for_large_pages(made)
    return made


def zeros_like(x: Tensor) -> Tensor:
    """`torch.zeros_like`."""
    return empty_like(x).zero_()


def _ask_for_large_pages(x: Tensor) -> None:
    """Only advice: where the system doesn't take it, nothing changes."""
    advise = _advise()
    if advise is None:
        return
    first = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    bytes_inside = (x.data_ptr() + x.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    advise(ctypes.c_void_p(first), ctypes.c_size_t(bytes_inside), mmap.MADV_HUGEPAGE)


@cache
def _advise() -> Advise | None:
    """The C library's `madvise`; None where there isn't any."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    return ctypes.CDLL(None).madvise
