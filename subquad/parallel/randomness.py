"""Random numbers of processes that share a layer: alike where they compute the same, different where they don't.

The processes of a row draw from equal generators, so that they drop the same channels of the stream and choose the same
experts. Hidden channels lie on different processes; what is drawn for them inside `apart` differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def apart(rank: int, device: torch.device) -> Iterator[None]:
    """Draw numbers that differ by `rank`; the generators go on afterwards as if one number had been drawn."""
    seed = int(torch.randint(2**62, (), dtype=torch.int64))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed + rank)
        yield


class ApartDropout(nn.Module):
    """Dropout of channels that lie on different processes.

    Args:
        rate: of channels set to 0, in training.
        rank: of this process among them.
    """

    def __init__(self, rate: float, rank: int) -> None:
        super().__init__()
        self.rate = rate
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, and the same."""
        if not (self.training and self.rate):
            return x
        with apart(self.rank, x.device):
            return nn.functional.dropout(x, self.rate)
