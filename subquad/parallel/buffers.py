"""Buffers that training moves, such as running means: those of the first row of processes count.

Every row moves them by its own part of the batch. `DistributedDataParallel` does the same.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from subquad.parallel.grid import DATA


def take_buffers_of_first_row(model: nn.Module, mesh: DeviceMesh) -> None:
    """Overwrite the buffers of the other rows; every process must call this, after a step."""
    for buffer in model.buffers():
        dist.broadcast(buffer, group=mesh.get_group(DATA), group_src=0)
