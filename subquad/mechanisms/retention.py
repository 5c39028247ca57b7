"""Retention: linear attention whose past fades by a constant factor, another one in each head; in place of the softmax.

Sun et al. 2023, "Retentive Network: A Successor to Transformer for Large Language Models", arXiv:2307.08621.

    o_i = Σ_{j<=i} γ^(i-j) (R_i q_i)·(R_j k_j) / √E v_j        y_i = (GroupNorm(o_i) ⊙ swish(x_i W_g)) W_o
    γ_h = 1 - 2^(-5-h), h = 0 ... H - 1; R_i: rotation by the angles i θ, θ from 1 down to 1/10000, both included

As a recurrence: S_i = γ S_{i-1} + (R_i k_i / √E) v_iᵀ, o_i = S_iᵀ R_i q_i. Values are twice as wide as keys.

Cost O(L (C + E) D) with chunks of C tokens, O(E D) state.

Departures: the paper divides the decays of a row by the root of their sum and a row by its sum where that exceeds 1, to
keep numbers small; GroupNorm, with a group for each head, cancels both, so they are left out, here and in flash-linear-
attention. The published code norms without subtracting the mean (`norm="rms"`) and limits the divisor to 50000. The
rotation pairs channel e with e + E/2, where the published code pairs neighbours: the same up to the order of channels.
Positions count valid tokens. Packed documents are refused: a matrix can't tell them apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from subquad.costs import Cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.layers.recurrent import (
    RecurrentHeads,
    RecurrentMixer,
    additive_cost,
    check_chunk,
    recurrent_cost,
)
from subquad.mask import Mask, token_positions
from subquad.ops.rotary import rotate
from subquad.registry import register
from subquad.state import State

ROTATION_BASE = 10_000.0
"""The slowest pair of channels turns by this much less than the fastest."""


@register("retention")
@dataclass(frozen=True, kw_only=True)
class RetentionConfig(MixerConfig):
    """Options of retention."""

    family: ClassVar[str] = "recurrent"
    why_not_rotary: ClassVar[str] = "it has a rotation of its own (rotation=True)"

    decays: tuple[float, ...] | None = None
    """γ of each head; None for 1 - 2^(-5-h)."""
    rotation: bool = True
    """Rotate queries and keys by their position; needs an even head_dim."""
    value_expansion: int = 2
    """Width of a value's head in units of head_dim."""
    norm: Literal["group", "rms"] = "group"
    """Norm of each head of the result: GroupNorm, or RMSNorm, which doesn't subtract the mean; neither has a gain."""
    gate: bool = True
    """Multiply the normed result by swish(x W_g)."""
    chunk: int = 64
    """Tokens per chunk, rounded down to a power of two: speed only, the result doesn't depend on it."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.decays is not None and not all(0 < decay <= 1 for decay in self.decays):
            raise ValueError(f"retention: decays must lie above 0 and at most at 1, got {list(self.decays)}")
        self.check_least({"value_expansion": 1})
        check_chunk("retention", self.chunk)

    @property
    def traits(self) -> Traits:
        """Causal alone; the matrix can't tell documents apart, hence no segments."""
        return Traits(causal=True, padding=True, state=True, constant_state=True)

    def check(self, dims: Dims) -> None:
        """The rotation takes pairs of channels, and every head has a decay.

        Raises:
            ValueError: an odd head to rotate, or another number of decays than heads.
        """
        if self.rotation and dims.head_dim % 2:
            raise ValueError(f"retention: rotation needs an even head_dim, got {dims.head_dim}; or rotation=False")
        if self.decays is not None and len(self.decays) != dims.num_heads:
            raise ValueError(f"retention: decays must name one for each of {dims.num_heads} heads, got {self.decays}")

    def heads(self, dims: Dims) -> RecurrentHeads:
        """Values are wider than keys."""
        return RecurrentHeads(
            width=dims.head_dim,
            value_width=self.value_expansion * dims.head_dim,
            centred=self.norm == "group",
            gain=False,
            gate=self.gate,
            chunk=self.chunk,
        )

    def build(self, dims: Dims) -> Retention:
        """The module."""
        return Retention(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections and the additive recurrence; autograd keeps sines and cosines of q and k, and γ of each head."""
        heads, wide_bytes = self.heads(dims), max(4, dtype_bytes)
        angles = 4 * length * (dims.head_dim // 2) if self.rotation else 0
        own = Cost(activation_bytes=wide_bytes * (angles + dims.num_heads))
        recurrence = additive_cost(dims, heads, length, dtype_bytes, decay_width=0)
        return recurrent_cost(dims, heads, length, dtype_bytes) + recurrence + own


class Retention(RecurrentMixer):
    """Multi-scale retention."""

    config: RetentionConfig

    def __init__(self, config: RetentionConfig, dims: Dims) -> None:
        super().__init__(config, dims, config.heads(dims))

    def recur(
        self, x: Tensor, qkv: tuple[Tensor, Tensor, Tensor], mask: Mask, state: State | None
    ) -> tuple[Tensor, State | None]:
        """Rotate, then let the past fade."""
        q, k, v = (self.split(tensor) for tensor in qkv)
        k = k * self.dims.head_dim**-0.5
        if self.config.rotation:
            start = None if state is None else state.length
            positions = token_positions(mask, *x.shape[:2], device=x.device, start=start)
            q, k = (rotate(tensor, positions, base=_base(self.dims.head_dim)) for tensor in (q, k))
        decays = self._log_decays(v)[:, None, None].expand(*q.shape[:3], 1)
        return self.run_recurrence(q, k, v, decays, mask, state)

    def _log_decays(self, like: Tensor) -> Tensor:
        """Log γ of each head, (H,)."""
        given = self.config.decays
        heads = range(self.dims.num_heads)
        logs = (
            [math.log1p(-(2.0 ** (-5 - h))) for h in heads] if given is None else [math.log(decay) for decay in given]
        )
        return torch.tensor(logs, device=like.device, dtype=like.dtype)


def _base(width: int) -> float:
    """The base with which `rotate` gives θ_e = 10000^(-e / (E/2 - 1)): the slowest pair is included."""
    half = width // 2
    return ROTATION_BASE ** (half / (half - 1)) if half > 1 else ROTATION_BASE
