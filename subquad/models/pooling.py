"""One vector for a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.mask import Mask


def pool(x: Tensor, mask: Mask | None, pooling: str) -> Tensor:
    """One vector per example, (B, D), of x (B, L, D), whose invalid tokens are 0."""
    if pooling == "cls":
        return x[:, 0]
    if mask is None or mask.valid is None:
        return {"first": x[:, 0], "last": x[:, -1]}[pooling] if pooling != "mean" else x.mean(dim=1)
    if pooling == "mean":
        return x.sum(dim=1) / mask.valid.sum(dim=1, keepdim=True).clamp_min(1)
    places = torch.arange(x.shape[1], device=x.device)
    if pooling == "first":
        index = torch.where(mask.valid, places, x.shape[1] - 1).amin(dim=1)
    else:
        index = torch.where(mask.valid, places, 0).amax(dim=1)
    return x[torch.arange(x.shape[0], device=x.device), index]
