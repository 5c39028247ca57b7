"""Timing by turns: every function once, then every one again, so that a slow phase of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved_seconds(
    functions: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Wall-clock seconds of each function, `rounds` samples each, taken by turns.

    On CUDA each sample waits for the device to finish. `warm_up` rounds come first and are not counted.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warm_up + rounds):
        for name, function in functions.items():
            seconds = _seconds(function)
            if turn >= warm_up:
                samples[name].append(seconds)
    return samples


def _seconds(function: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_flops_per_second(size: int = 1024, *, rounds: int = 7) -> float:
    """The rate of a float32 product of two size x size matrices on this machine: the yardstick of every other rate."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.rand(size, size, device=device) for _ in range(2))
    seconds = interleaved_seconds({"product": lambda: a @ b}, rounds=rounds, warm_up=2)["product"]
    return 2 * size**3 / statistics.median(seconds)
