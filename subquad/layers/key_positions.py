"""Learned numbers for pairs of positions, and the memory of means over keys that positions may still change."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from subquad.ops.means.position_bias import FactorisedBias, KernelBias, PositionBias
from subquad.ops.means.running_means import NOTHING
from subquad.ops.recomputed import recomputed
from subquad.state import State, state_dataclass

KERNEL_EPSILON = 1e-5
"""Added to the variance of a kernel."""


class Positions(nn.Module, ABC):
    """Learned numbers for pairs of positions."""

    @abstractmethod
    def bias(self, starts: Tensor | None, length: int, stored: int) -> PositionBias:
        """The bias of a call.

        Args:
            starts: int64 (B,), position of the first query; None for 0 in all examples.
            length: L, queries.
            stored: columns before them.
        """

    @abstractmethod
    def initialise(self) -> None:
        """Draw the parameters."""


class FactorisedPositions(Positions):
    """Products of short vectors of the positions up to a longest."""

    def __init__(self, longest: int, rank: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.rows, self.columns = (nn.Parameter(torch.empty(longest, rank)) for _ in range(2))
        self.initialise()

    def initialise(self) -> None:
        """Normal numbers."""
        for factor in (self.rows, self.columns):
            nn.init.normal_(factor, std=self.std)

    def bias(self, starts: Tensor | None, length: int, stored: int) -> FactorisedBias:
        """The vectors of the positions; columns before position 0 hold no key and take its vector."""
        if starts is None:
            return FactorisedBias(self.rows[None, :length], self.columns[None, :length])
        starts = starts[:1] if bool((starts == starts[:1]).all()) else starts
        positions = starts[:, None] + torch.arange(-stored, length, device=starts.device)
        positions = positions.clamp(0, self.rows.shape[0] - 1)
        return FactorisedBias(self.rows[positions[:, stored:]], self.columns[positions])


class KernelPositions(Positions):
    """Kernels over distances, γ (κ - mean κ) / std κ + β, that begin with γ = β = 0."""

    def __init__(self, heads: int, size: int, left: int, width: int | None) -> None:
        super().__init__()
        self.left, self.width = left, width
        self.kernels = nn.Parameter(torch.empty(heads, size))
        self.gain, self.shift = (nn.Parameter(torch.empty(heads, 1)) for _ in range(2))
        self.initialise()

    def initialise(self) -> None:
        """Normal kernels without effect."""
        nn.init.normal_(self.kernels)
        nn.init.zeros_(self.gain)
        nn.init.zeros_(self.shift)

    def bias(self, starts: Tensor | None, length: int, stored: int) -> KernelBias:
        """The kernels, wherever the queries stand."""
        return KernelBias(recomputed(_normed, self.kernels, self.gain, self.shift), self.left, self.width)


def _normed(kernels: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    wide = torch.promote_types(kernels.dtype, torch.float32)
    kernels, gain, shift = kernels.to(wide), gain.to(wide), shift.to(wide)
    centred = kernels - kernels.mean(dim=1, keepdim=True)
    return gain * centred * (centred.square().mean(dim=1, keepdim=True) + KERNEL_EPSILON).rsqrt() + shift


@state_dataclass
class KeyMemory(State):
    """The mean over keys out of the reach of positions, and the keys and values in it, the newest last.

    Attributes:
        length: int64 (B,).
        weight: (B, G, 1, E or 1), logarithm of the weight of the mean; `NOTHING` while there is none.
        mean: (B, G, 1, E).
        keys: (B, G, T, E or 1); columns that hold no token are `NOTHING`.
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
    weight, keys = (torch.full((*shape, n, widths[0]), NOTHING, device=device, dtype=dtype) for n in (1, stored))
    mean, values = (torch.zeros((*shape, n, widths[1]), device=device, dtype=dtype) for n in (1, stored))
    return KeyMemory(length, weight, mean, keys, values)


def extended(memory: KeyMemory, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, G, 1 + T + L, ·) that a call meets: the mean as the first, the stored ones, its own."""
    wide = memory.keys.dtype
    return (
        torch.cat((memory.weight, memory.keys, k.to(wide)), dim=2),
        torch.cat((memory.mean, memory.values, v.to(wide)), dim=2),
    )


def remembered(memory: KeyMemory, k: Tensor, v: Tensor, added: Tensor, stored: int | None) -> KeyMemory:
    """The memory after a call.

    Args:
        memory: the one before it.
        k: (B, G, 1 + T + L, E or 1), as `extended` gives it.
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
    left = k.masked_fill((places > 0) & (places >= first), -torch.inf)
    weight = left.logsumexp(dim=2, keepdim=True)
    mean = (left.softmax(dim=2) * v).sum(dim=2, keepdim=True)
    return KeyMemory(length, weight, mean, keys, values)
