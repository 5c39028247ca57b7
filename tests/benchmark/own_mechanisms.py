"""Mechanisms of a user's own: dense attention, sound or with one thing wrong. Named by the path of this file."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from subquad.costs import Cost
from subquad.interface import Dims, MixerConfig, TokenMixer, Traits
from subquad.layers.heads import Heads
from subquad.mask import Mask
from subquad.mechanisms.full import Full, FullConfig
from subquad.state import State


@dataclass(frozen=True, kw_only=True)
class SoundConfig(MixerConfig):
    """Dense attention under another name."""

    module: ClassVar[type[Full]] = Full

    scale: float = 1.0
    """Unused; an option to name."""

    @property
    def traits(self) -> Traits:
        return Traits(bidirectional=True, padding=True, approximates_softmax=True)

    def build(self, dims: Dims) -> TokenMixer:
        return self.module(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        return FullConfig().cost(dims, length, dtype_bytes)


class OnlyInTraining(Full):
    """What goes wrong goes wrong in training alone, after every proof."""

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        if self.training:
            self.go_wrong()
        return super().attend(heads, state)

    def go_wrong(self) -> None:
        raise ValueError("out of ideas\nand of words")


class OutOfDeviceMemory(OnlyInTraining):
    def go_wrong(self) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class OutOfHostMemory(OnlyInTraining):
    def go_wrong(self) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes")


class KillsItsProcess(OnlyInTraining):
    def go_wrong(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class NotANumber(Full):
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        out, new_state = super().attend(heads, state)
        return (out * torch.nan if self.training else out), new_state


class SeesTheFuture(Full):
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        out, new_state = super().attend(heads, state)
        return out + heads.q.mean(dim=2, keepdim=True), new_state


class IgnoresPadding(Full):
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        return super().attend(heads._replace(mask=Mask(), key_mask=Mask()), state)


class RaisesConfig(SoundConfig):
    module = OnlyInTraining


class DeviceMemoryConfig(SoundConfig):
    module = OutOfDeviceMemory


class HostMemoryConfig(SoundConfig):
    module = OutOfHostMemory


class KillsConfig(SoundConfig):
    module = KillsItsProcess


class NanConfig(SoundConfig):
    module = NotANumber


class PaddingConfig(SoundConfig):
    module = IgnoresPadding


class CausalConfig(SoundConfig):
    """Only causal."""

    @property
    def traits(self) -> Traits:
        return Traits(causal=True)


class LeakConfig(CausalConfig):
    module = SeesTheFuture


class ShortConfig(SoundConfig):
    """Refuses what the tiny preset asks for."""

    @property
    def traits(self) -> Traits:
        return replace(super().traits, fixed_length=True)

    def build(self, dims: Dims) -> TokenMixer:
        raise ValueError("short: at most 3 tokens")


class BrokenConfig(SoundConfig):
    """Can't be built, for a reason it didn't think of."""

    def build(self, dims: Dims) -> TokenMixer:
        raise KeyError("width")


class KillsInProofsConfig(SoundConfig):
    """Ends its process when it is called at all."""

    class Module(Full):
        def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
            os.kill(os.getpid(), signal.SIGKILL)
            return super().attend(heads, state)

    module = Module


class UnfinishedConfig(MixerConfig):
    """Lacks its methods."""


class NoConfig:
    """Derived from nothing."""
