"""Learned numbers for pairs of positions, which are added to keys."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from subquad.ops.means.position_bias import FactorisedBias, KernelBias, PositionBias
from subquad.ops.precision import wide_dtype
from subquad.ops.recomputed import recomputed

KERNEL_EPSILON = 1e-5
"""Added to the variance of a kernel."""


class LearnedPositions(nn.Module, ABC):
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


class FactorisedPositions(LearnedPositions):
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


class KernelPositions(LearnedPositions):
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
    wide = wide_dtype(kernels)
    kernels, gain, shift = kernels.to(wide), gain.to(wide), shift.to(wide)
    centred = kernels - kernels.mean(dim=1, keepdim=True)
    return gain * centred * (centred.square().mean(dim=1, keepdim=True) + KERNEL_EPSILON).rsqrt() + shift
