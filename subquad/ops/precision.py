"""Arithmetic that autocast must not narrow: sums over a sequence, exponentials and normalisers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A block in which autocast is off, so that matrix products keep the dtype of their arguments."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
