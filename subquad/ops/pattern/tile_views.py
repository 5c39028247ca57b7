"""The keys of a piece in tiles: as views, gathered, and as sums of gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.patterns.pattern import Indices


class GatherBuffer:
    """Memory for gathered tiles, used again from call to call: fresh pages cost more than the copy itself."""

    def __init__(self, like: Tensor) -> None:
        self._memory = like.new_empty(0)

    def gather(self, tiles: Tensor, chosen: Indices) -> Tensor:
        """(G, tiles, size, E) -> (N, G, C * size, E)."""
        sequences, _, size, width = tiles.shape
        elements = sequences * chosen.size * size * width
        if self._memory.numel() < elements:
            self._memory = tiles.new_empty(elements)
        gathered = self._memory[:elements].view(sequences, chosen.size, size, width)
        index = torch.from_numpy(chosen.ravel()).to(tiles.device)
        for of_sequence, target in zip(tiles, gathered, strict=True):
            torch.index_select(of_sequence, 0, index, out=target)
        return gathered.unflatten(1, chosen.shape).flatten(2, 3).transpose(0, 1)


def tiled(x: Tensor, size: int) -> Tensor:
    """(G, S, E) -> (G, tiles, size, E): a view, or a copy with zeros behind the end where tiles stick out over it."""
    missing = -x.shape[1] % size
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(1, (-1, size))


def sums_of(x: Tensor, size: int) -> Tensor:
    """Tiles (G, tiles, size, E) to add to: those of x (G, S, E), or zeros where tokens lie apart or tiles stick out.

    Adding to tiles whose tokens lie apart in memory, as those of heads side by side do, takes ten times as long.
    """
    if x.is_contiguous() and not x.shape[1] % size:
        return tiled(x, size)
    return x.new_zeros(len(x), -(-x.shape[1] // size), size, x.shape[2])


def settle(x: Tensor, sums: Tensor) -> None:
    """Add what `sums_of` collected apart."""
    if sums.data_ptr() != x.data_ptr():
        x.add_(sums.flatten(1, 2)[:, : x.shape[1]])
