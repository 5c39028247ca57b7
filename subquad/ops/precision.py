"""Arithmetic that autocast must not narrow: sums over a sequence, exponentials and normalisers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """What sums, exponentials and normalisers of x run in: its dtype, but float32 where that is narrower."""
    return torch.promote_types(x.dtype, torch.float32)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A block in which autocast is off, so that matrix products keep the dtype of their arguments."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a matrix product of x would run here."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(kind)
