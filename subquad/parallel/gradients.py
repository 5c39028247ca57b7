"""The norm of a gradient that lies in parts on many processes, and cutting it.

    ‖g‖² = Σ over processes p, parameters w of ‖g_w[p]‖² / copies of w

A parameter that all processes of a row have counts once, and so does an expert, wherever it lies.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from subquad.ops.precision import wide_dtype


def local_part(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copies(tensor: Tensor, world_size: int) -> int:
    """On how many processes each number of a tensor lies."""
    if not isinstance(tensor, DTensor):
        return world_size
    mesh = tensor.device_mesh
    cut = [mesh.size(dim) for dim, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
    return world_size // prod(cut)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The Euclidean norm of all gradients together, a float32 or wider scalar, equal on all processes."""
    world_size, squares = dist.get_world_size(), []
    for parameter in parameters:
        if parameter.grad is not None:
            part = local_part(parameter.grad)
            wide = part.to(wide_dtype(part))
            squares.append(wide.square().sum() / copies(parameter.grad, world_size))
    total = torch.stack([square.double() for square in squares]).sum() if squares else torch.zeros(())
    dist.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their norm is at most `limit`; returns the norm before."""
    every = list(parameters)
    norm = gradient_norm(every)
    factor = (limit / (norm + 1e-6)).clamp_max(1.0)
    for parameter in every:
        if parameter.grad is not None:
            part = local_part(parameter.grad)
            part.mul_(factor.to(part.dtype))
    return norm
