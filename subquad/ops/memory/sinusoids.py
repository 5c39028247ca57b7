"""Sinusoids of distances, as Transformer-XL encodes them: all sines first, then all cosines."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def distance_sinusoids(count: int, width: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Encodings of the distances 0, ..., count - 1.

    Args:
        count: N.
        width: D; where it is odd there is one sine more than there are cosines.
        device: of the result.
        dtype: of the result; it is rounded at the end.

    Returns:
        (N, D): sin(δ ω_n) for ω_n = 10000^(-2n / D), then cos(δ ω_n).
    """
    channels = torch.arange(0, width, 2, device=device, dtype=torch.float64)
    frequencies = torch.exp(channels * (-math.log(10_000.0) / width))
    angles = torch.arange(count, device=device, dtype=torch.float64)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :width].to(dtype)
