"""Freed memory stays in the process, for a while."""

from __future__ import annotations

import multiprocessing
import platform
import resource
from contextlib import nullcontext

import pytest
import torch

from subquad.benchmark.allocator import freed_memory_kept
from subquad.benchmark.memory import resident_bytes

BYTES = 2**26
TENSORS = 60

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")


def page_faults(keep: bool) -> int:
    """Those of one tensor after the other, each freed before the next."""
    torch.ones(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with freed_memory_kept() if keep else nullcontext():
        for _ in range(TENSORS):
            torch.ones(BYTES // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def bytes_held() -> tuple[int, int]:
    """At the end of a block, and behind it."""
    with freed_memory_kept():
        torch.ones(BYTES // 4)
        inside = resident_bytes()
    outside = resident_bytes()
    assert inside is not None
    assert outside is not None
    return inside, outside


def test_tensors_take_the_memory_of_those_before() -> None:
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        given_back, kept = pool.apply(page_faults, (False,)), pool.apply(page_faults, (True,))
    assert kept < given_back / 2


def test_at_the_end_all_of_it_is_given_back() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        inside, outside = pool.apply(bytes_held)
    assert outside < inside - BYTES / 2
