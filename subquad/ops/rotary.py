"""Rotary positions: queries and keys turned by an angle proportional to their position (arXiv 2104.09864).

Channel e is paired with channel e + E/2 and the pair is rotated by `position * base^(-2e/E)`, so that the product of a
query and a key depends on the difference of their positions alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, *, base: float = 10_000.0) -> Tensor:
    """Rotate x (B, H, L, E), E even, by integer positions (B, L). Angles are computed in float64."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = positions[:, None, :, None].double() * frequencies
    working_dtype = torch.promote_types(x.dtype, torch.float32)
    cosine, sine = angles.cos().to(working_dtype), angles.sin().to(working_dtype)
    first, second = x.to(working_dtype).split(half, dim=-1)
    rotated = torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
    return rotated.to(x.dtype)
