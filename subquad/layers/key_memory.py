"""The memory of a stream of means over keys: a mean of what no position can change any more, and the keys behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.means.running_means import LOG_ZERO
from subquad.state import State, state_dataclass


@state_dataclass
class KeyMemory(State):
    """The mean over keys out of the reach of positions, and the keys and values in it, the newest last.

    Attributes:
        length: int64 (B,).
        weight: (B, G, 1, E or 1), logarithm of the weight of the mean; `LOG_ZERO` while there is none.
        mean: (B, G, 1, E).
        keys: (B, G, T, E or 1); columns that hold no token are `LOG_ZERO`.
        values: (B, G, T, E).
    """

    weight: Tensor
    mean: Tensor
    keys: Tensor
    values: Tensor


def empty_memory(
    shape: tuple[int, int], widths: tuple[int, int], stored: int, device: torch.device, dtype: torch.dtype
) -> KeyMemory:
    """Nothing seen yet: `shape` (B, G), widths of keys and values, T."""
    length = torch.zeros(shape[0], dtype=torch.int64, device=device)
    weight, keys = (torch.full((*shape, n, widths[0]), LOG_ZERO, device=device, dtype=dtype) for n in (1, stored))
    mean, values = (torch.zeros((*shape, n, widths[1]), device=device, dtype=dtype) for n in (1, stored))
    return KeyMemory(length, weight, mean, keys, values)


def joined_keys(memory: KeyMemory, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, G, 1 + T + L, ·) that a call meets: the mean as the first, the stored ones, its own."""
    wide = memory.keys.dtype
    return (
        torch.cat((memory.weight, memory.keys, k.to(wide)), dim=2),
        torch.cat((memory.mean, memory.values, v.to(wide)), dim=2),
    )


def next_state(memory: KeyMemory, k: Tensor, v: Tensor, added: Tensor, stored: int | None) -> KeyMemory:
    """The memory after a call.

    Args:
        memory: the one before it.
        k: (B, G, 1 + T + L, E or 1), as `joined_keys` gives it.
        v: (B, G, 1 + T + L, E).
        added: int64 (B,), valid tokens of the call, which precede its invalid ones.
        stored: columns to keep, T of the new memory; None for all tokens.
    """
    length = memory.length + added
    kept = max([0, *length.tolist()]) if stored is None else stored
    first = (1 + memory.keys.shape[2] + added - kept)[:, None, None, None]
    index = (first + torch.arange(kept, device=k.device)[:, None]).clamp_min(0)  # before all there is the empty mean
    keys, values = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v))
    places = torch.arange(k.shape[2], device=k.device)[:, None]
    leaving = k.masked_fill((places > 0) & (places >= first), -torch.inf)
    weight = leaving.logsumexp(dim=2, keepdim=True)
    mean = (leaving.softmax(dim=2) * v).sum(dim=2, keepdim=True)
    return KeyMemory(length, weight, mean, keys, values)
