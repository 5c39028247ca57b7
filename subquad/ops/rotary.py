"""Rotary positions: queries and keys turned by an angle proportional to their position (arXiv 2104.09864).

Channel e is paired with channel e + E/2 and the pair is rotated by `position * base^(-2e/E)`, so that the product of a
query and a key depends on the difference of their positions alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.precision import wide_dtype


def rotate(x: Tensor, positions: Tensor, *, base: float = 10_000.0) -> Tensor:
    """Rotate x (B, H, L, E), E even, by integer positions (B, L). Angles are computed in float64."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = positions[:, None, :, None].double() * frequencies
    wide = wide_dtype(x)
    cosine, sine = angles.cos().to(wide), angles.sin().to(wide)
    first, second = x.to(wide).split(half, dim=-1)
    rotated = torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
    return rotated.to(x.dtype)
