"""Joining the other processes, and what is said when one of them is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from subquad.parallel.grid import Grid

_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


class LostProcessError(RuntimeError):
    """Another process ended or fell silent."""


@dataclass(frozen=True)
class Place:
    """This process among the others, as torchrun tells it."""

    rank: int
    local_rank: int
    world_size: int


def place() -> Place:
    """Where torchrun has put this process.

    Raises:
        ValueError: it wasn't started by torchrun.
    """
    missing = [name for name in _PLACE if name not in os.environ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} is not set: start the program with torchrun, for one process too, as in "
            "`torchrun --nproc-per-node 1 -m subquad.parallel.train`"
        )
    return Place(*(int(os.environ[name]) for name in _PLACE))


@contextmanager
def joined(grid: Grid, here: Place, *, device_type: str, timeout_seconds: float) -> Iterator[torch.device]:
    """A block in which this process is one of the group; gives the device that it computes on.

    Raises:
        ValueError: a grid of another size than the world, or a GPU that isn't there.
        LostProcessError: another process ended, or said nothing for so many seconds.
    """
    if grid.processes != here.world_size:
        raise ValueError(f"the grid has {grid.processes} processes, but {here.world_size} were started")
    device = torch.device(device_type)
    if device_type == "cuda":
        if here.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"there is no GPU {here.local_rank} on this machine, which has {torch.cuda.device_count()}; start as "
                "many processes as GPUs, or choose --device cpu"
            )
        device = torch.device("cuda", here.local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device_type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        yield device
        dist.barrier(device_ids=None if device.index is None else [device.index])  # nobody leaves while another works
    except RuntimeError as error:
        if not _is_of_the_network(error):
            raise
        raise LostProcessError(
            f"process {here.rank} of {here.world_size} has lost another one, which ended or said nothing for "
            f"{timeout_seconds:g} seconds ({_first_line(error)})"
        ) from error
    dist.destroy_process_group()


def _is_of_the_network(error: RuntimeError) -> bool:
    """Torch's own kinds of error; gloo raises plain ones, which name its source files."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
