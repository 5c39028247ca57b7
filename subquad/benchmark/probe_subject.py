"""What a probe works on: a mechanism made small enough for proofs, its inputs, and how a finding is worded.

What is claimed holds for every size, so it is tested at small ones, where exact comparisons take milliseconds:
`miniature` shrinks every option that is a size known by its name (window, block, rank, ...), so that a short sequence
spans several windows and blocks and a part of one. Options with other names are left as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.build import build_from_config
from subquad.interface import Dims, Mixed, MixerConfig, TokenMixer
from subquad.mask import Mask
from subquad.state import State

EXACT, EQUAL = 1e-12, 1e-10
"""Differences in float64 that count as none: where nothing may change, and where the order of sums may."""
LENGTH = 37
"""Tokens of an ordinary probe: prime, so that it is no multiple of any block."""

CONTEXT_LENGTH = 23
"""Tokens of the context in cross-attention."""

MAX_LENGTH = 96
"""`max_length` of mechanisms that are bound to one."""

_SMALL = {"block": 4, "chunk": 4, "stride": 4, "summary": 2, "landmarks": 4, "rank": 6, "features": 8, "top_k": 3}
_SMALL |= {"num_random": 1, "num_global": 3}
_MEMORIES = {"memory_length": 8, "eval_memory_length": 8, "compressed_length": 4, "segment_length": 4}


class Finding(NamedTuple):
    """What a probe found: whether the claim holds, and a plain sentence with the measured figure and the tolerance."""

    passed: bool
    detail: str


class Inputs(NamedTuple):
    """A batch: x (B, L, D), and the context (B, S, D) of cross-attention or None."""

    x: Tensor
    context: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same change to both."""
        return Inputs(change(self.x), None if self.context is None else change(self.context))

    def tensors(self) -> list[Tensor]:
        """Those that there are."""
        return [self.x] if self.context is None else [self.x, self.context]


@dataclass(frozen=True)
class Subject:
    """A mechanism in the form and at the size in which it is probed; makes modules and inputs in float64.

    Attributes:
        config: the mechanism's options, made small.
        dims: the form (bidirectional, causal or cross), with small widths.
        asked: the options as they were asked for.
        seed: of parameters and inputs.
    """

    config: MixerConfig
    dims: Dims
    asked: MixerConfig
    seed: int = 0

    def mixer(self, *, dtype: torch.dtype = torch.float64) -> TokenMixer:
        """The module in evaluation mode, its parameters disturbed so that no bias is 0."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            mixer = build_from_config(self.config, self.dims).double().eval()
            with torch.no_grad():
                for parameter in mixer.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
        return mixer.to(dtype)

    def inputs(self, length: int = LENGTH, *, batch: int = 3, salt: int = 0) -> Inputs:
        """Standard normal inputs, float64; another `salt` gives other ones."""
        generator = torch.Generator().manual_seed(1000 * self.seed + salt)
        shape = (batch, length, self.dims.embed_dim)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if not self.dims.cross:
            return Inputs(x, None)
        shape = (batch, CONTEXT_LENGTH, self.dims.embed_dim)
        return Inputs(x, torch.randn(shape, generator=generator, dtype=torch.float64))

    def mask_kinds(self) -> list[tuple[str, Mask | None, Mask | None]]:
        """Label, mask of x and mask of the context, batch 3, for every constraint that the mechanism honours."""
        kinds: list[tuple[str, Mask | None, Mask | None]] = [("", None, None)]
        if self.config.traits.padding:
            kinds.append(
                (" with padding", Mask(some_valid(LENGTH)), self._of_context(Mask(some_valid(CONTEXT_LENGTH))))
            )
        if self.config.traits.segments:
            context_mask = self._of_context(Mask(segments=some_segments(CONTEXT_LENGTH)))
            kinds.append((" with segments", Mask(segments=some_segments(LENGTH)), context_mask))
        return kinds

    def _of_context(self, mask: Mask) -> Mask | None:
        return mask if self.dims.cross else None


def small_subject(config: MixerConfig, dims: Dims, *, seed: int = 0) -> Subject:
    """The subject of the proofs about `config` in the form that `dims` asks for."""
    return Subject(miniature(config), _small_dims(config, dims), config, seed)


def miniature(config: MixerConfig, *, memories: bool = False) -> MixerConfig:
    """The config with its sizes shrunk for sequences of a few dozen tokens; sizes that it refuses are left.

    Args:
        config: the options to shrink.
        memories: shrink memories and segments too, of which one otherwise holds a whole probe.
    """
    limits = _SMALL | (_MEMORIES if memories else {})
    changes = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if type(value) is not int:
            continue
        limit = 4 + value % 2 if field.name == "window" else limits.get(field.name, value)  # a window stays odd or even
        changes[field.name] = min(value, limit)
    for name, value in sorted(changes.items(), key=lambda change: change[1]):  # parts before what they must fit into
        try:
            config = replace(config, **{name: value})
        except ValueError:
            continue  # this size belongs to another form of the mechanism
    return config


def _small_dims(config: MixerConfig, dims: Dims) -> Dims:
    heads = min(2, dims.num_heads)
    bound = config.traits.fixed_length or dims.max_length is not None
    return replace(dims, embed_dim=4 * heads, num_heads=heads, head_dim=4, max_length=MAX_LENGTH if bound else None)


def call(
    mixer: TokenMixer,
    inputs: Inputs,
    mask: Mask | None = None,
    context_mask: Mask | None = None,
    state: State | None = None,
) -> Mixed:
    """Call the mixer without gradients."""
    with torch.no_grad():
        return mixer(inputs.x, inputs.context, mask=mask, context_mask=context_mask, state=state)


def gradients(
    mixer: TokenMixer, inputs: Inputs, output_rows: Tensor, mask: Mask | None = None, context_mask: Mask | None = None
) -> tuple[Inputs, list[Tensor]]:
    """Gradients of a random combination of the outputs at `output_rows` (bool (B, L)).

    Returns:
        Those of x and the context, and those of every parameter that got one.
    """
    leaves = inputs.map(lambda tensor: tensor.detach().clone().requires_grad_())
    mixer.zero_grad()
    y = mixer(*leaves, mask=mask, context_mask=context_mask).y
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    (y * weights).masked_fill(~output_rows[..., None], 0.0).sum().backward()
    of_inputs = leaves.map(lambda tensor: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
    return of_inputs, [p.grad for p in mixer.parameters() if p.grad is not None]


def some_valid(length: int) -> Tensor:
    """Bool (3, length): no padding, right padding, and padding on the left and in holes."""
    valid = torch.ones(3, length, dtype=torch.bool)
    valid[1, length * 2 // 3 :] = False
    valid[2, :3] = False
    valid[2, 5::4] = False
    return valid


def some_segments(length: int) -> Tensor:
    """Int64 (3, length): one, two and three documents, not numbered from 0."""
    segments = torch.full((3, length), 2)
    segments[1, length // 3 :] = 3
    segments[2, length // 4 :] = 5
    segments[2, length // 2 :] = 9
    return segments


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value where that exceeds 1; NaN if anything is NaN."""
    if not expected.numel():
        return 0.0
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1.0))


def largest(tensors: Iterable[Tensor]) -> float:
    """Largest absolute value in all tensors; NaN if anything is NaN."""
    return worst(float(tensor.abs().max()) for tensor in tensors if tensor.numel())


def worst(values: Iterable[float]) -> float:
    """The largest; NaN if any is NaN, 0 of none."""
    collected = list(values)
    return math.nan if any(math.isnan(value) for value in collected) else max(collected, default=0.0)


def at_most(measured: float, tolerance: float, claim: str) -> Finding:
    """A finding that holds when `measured` does not exceed `tolerance`; NaN exceeds everything."""
    return Finding(measured <= tolerance, f"{claim}: largest difference {measured:.1e}, tolerance {tolerance:.0e}")
