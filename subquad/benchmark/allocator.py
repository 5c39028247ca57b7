"""What the C library does with freed memory, which decides whether a step pays for the system's page faults."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""What glibc's `mallopt` calls M_TRIM_THRESHOLD and M_MMAP_MAX; -1 for the first is never, 0 for the second none."""


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed memory for the next tensor in the block, and give all of it back to the system at the end.

    Left alone, glibc gives back every tensor beyond 32 MiB and takes the next one anew, page by page. On a virtual
    machine whose host takes pages back as well, that took up to half of a step, more in one and less in the next.
    Allocators made for training keep what was freed, torch's own on CUDA among them. Other C libraries are left alone.
    From the first block on this process takes tensors from its heap; don't measure its resident memory.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(TRIM_THRESHOLD, -1)
    library.mallopt(MMAP_MAX, 0)
    try:
        yield
    finally:
        library.malloc_trim(0)
