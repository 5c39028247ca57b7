"""cosFormer: linear attention with φ = ReLU, weighted by the cosine of the distance, which splits into two features.

Qin et al. 2022, "cosFormer: Rethinking Softmax in Attention", arXiv:2202.08791.

    o_i = Σ_j s_ij v_j / (Σ_j s_ij + ε)      s_ij = relu(q_i)·relu(k_j) cos(π (i - j) / 2M)      causal: j <= i
    cos(a - b) = cos a cos b + sin a sin b: features (relu(x_i) cos(π i / 2M), relu(x_i) sin(π i / 2M))

Cost O(L E D) time, O(E D) state: twice that of `linear`. No 1/√E. M is `max_length`, a constant: distances beyond it
would get negative weights, so longer input is refused, that of a stream too.

Departures: the published code takes the longest sequence of the batch for M, so that a prefix isn't the prefix of the
whole and generation can't match training; it takes max(Σ s, ε) for the divisor; and its causal form builds the sums of
every token. The context of cross-attention has positions of its own, from 0, as in the published code. Positions count
valid tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from subquad.costs import Cost
from subquad.heads import HeadMixer, Heads, projection_cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.mask import Mask, token_positions
from subquad.ops.linear import CHUNK, DENOMINATOR_EPSILON, linear_attention, zero_keys
from subquad.ops.precision import full_precision
from subquad.registry import register
from subquad.state import State, state_dataclass


@register("cosformer")
@dataclass(frozen=True, kw_only=True)
class CosformerConfig(MixerConfig):
    """cosFormer has no options."""

    family: ClassVar[str] = "factorised"

    @property
    def traits(self) -> Traits:
        """Bound to `max_length` by its constant M; sums can't tell documents apart, hence no segments."""
        return Traits(
            bidirectional=True,
            causal=True,
            cross=True,
            padding=True,
            state=True,
            constant_state=True,
            fixed_length=True,
        )

    def check(self, dims: Dims) -> None:
        """Positions are in the weights.

        Raises:
            ValueError: rotary positions, which could make weights negative.
        """
        if dims.positions == "rotary":
            raise ValueError("cosformer: has positions of its own, in the weights; use positions='none'")

    def build(self, dims: Dims) -> Cosformer:
        """The module."""
        return Cosformer(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """As linear attention with twice as many features as channels.

        Autograd keeps, besides the projections, relu of q and k, their cosines and sines, and what `linear_attention`
        keeps. A context is as long as x.
        """
        inner, heads, width = dims.inner_dim, dims.num_heads, dims.head_dim
        wide_bytes, sums = max(4, dtype_bytes), 2 * inner * (width + 1)
        if dims.causal:
            chunk = max(1, min(CHUNK, length))
            chunks = -(-length // chunk)
            tokens = chunks * chunk
            pairs = tokens * chunk
            kept = 2 * length * (inner + 1) + tokens * (6 * inner + heads) + pairs * heads + max(2, chunks) * sums
        else:
            tokens, pairs = length, 0
            kept = length * (8 * inner + heads + 2 + 2 * dims.cross) + sums
        return projection_cost(dims, length, dtype_bytes, kept=0) + Cost(
            flops=2 * tokens * 2 * inner * (2 * width + 1) + 2 * pairs * inner * 3,
            activation_bytes=wide_bytes * kept,
            state_bytes=wide_bytes * sums if dims.causal or dims.cross else 0,
        )


@state_dataclass
class CosformerState(State):
    """The sums over everything seen.

    Attributes:
        length: int64 (B,), valid tokens of x so far.
        filled: bool (B,), cross-attention: whether the context has been summed.
        sums: (B, H, 2 E, E + 1), Σ φ(k) (v, 1)ᵀ.
    """

    filled: Tensor
    sums: Tensor


class Cosines(NamedTuple):
    """Cosine and sine of π i / 2M for each token, (B, 1, L, 1), float32 or wider."""

    cosine: Tensor
    sine: Tensor


class Cosformer(HeadMixer):
    """Linear attention weighted by the cosine of the distance."""

    config: CosformerConfig

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> CosformerState:
        """All sums 0."""
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        shape = (batch_size, self.dims.num_heads, 2 * self.dims.head_dim, self.dims.head_dim + 1)
        return CosformerState(length, length > 0, torch.zeros(shape, device=device, dtype=dtype))

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Weigh by the positions, then sum; never narrowed by autocast."""
        with full_precision(heads.q.device):
            if isinstance(state, CosformerState):
                return self._continue(heads, state)
            cosines = self._cosines(heads.q, heads.mask, None)
            q, (k, v) = _features(heads.q, cosines), self._keys(heads, None if self.dims.cross else cosines)
            return linear_attention(q, k, v, causal=self.dims.causal, valid=heads.key_mask.valid), None

    def _continue(self, heads: Heads, state: CosformerState) -> tuple[Tensor, CosformerState]:
        """Read the sums of the state too, or, in cross-attention, only those of the context."""
        length = state.length + (heads.q.shape[2] if heads.mask.valid is None else heads.mask.valid.sum(dim=1))
        self._check_length(length)
        cosines = self._cosines(heads.q, heads.mask, state.length)
        q = _features(heads.q, cosines)
        sums = state.sums.to(q.dtype)
        if self.dims.cross:
            sums = self._context_sums(heads, state)
            joined = q @ sums
        else:
            k, v = self._keys(heads, cosines)
            valid, ones = heads.mask.valid, torch.ones_like(v[..., :1])
            joined = linear_attention(q, k, torch.cat((v, ones), dim=-1), causal=True, normalize=False, valid=valid)
            joined = joined + q @ sums
            sums = sums + _sum(k, v, valid)
        out = joined[..., :-1] / (joined[..., -1:] + DENOMINATOR_EPSILON)
        return out, CosformerState(length, torch.ones_like(state.filled), sums.to(state.sums.dtype))

    def _context_sums(self, heads: Heads, state: CosformerState) -> Tensor:
        """Those of the context of this call, or of an earlier one."""
        filled = bool(state.filled.all())
        if heads.k is None:
            if not filled:
                raise ValueError("cosformer: the state holds no context yet; pass context (B, S, D) in the first call")
            return state.sums.to(torch.promote_types(heads.q.dtype, torch.float32))
        if filled and state.filled.numel():
            raise ValueError(
                "cosformer: the state holds a context already; pass context=None, or begin with a new state"
            )
        return _sum(*self._keys(heads, None), heads.key_mask.valid)

    def _keys(self, heads: Heads, cosines: Cosines | None) -> tuple[Tensor, Tensor]:
        """Features of the keys (B, H, S, 2 E), and the values; a context has positions of its own."""
        assert heads.k is not None
        assert heads.v is not None
        k = _features(heads.k, self._cosines(heads.k, heads.key_mask, None) if cosines is None else cosines)
        return k, heads.v.to(k.dtype)

    def _cosines(self, x: Tensor, mask: Mask, start: Tensor | None) -> Cosines:
        """Of the positions of the tokens of x (B, H, L, E); angles are computed in float64."""
        assert self.dims.max_length is not None
        positions = token_positions(mask, x.shape[0], x.shape[2], device=x.device, start=start)
        angles = positions[:, None, :, None].double() * (math.pi / (2 * self.dims.max_length))
        wide = torch.promote_types(x.dtype, torch.float32)
        return Cosines(angles.cos().to(wide), angles.sin().to(wide))

    def _check_length(self, length: Tensor) -> None:
        assert self.dims.max_length is not None
        if length.numel() and int(length.max()) > self.dims.max_length:
            raise ValueError(
                f"cosformer: the stream has {int(length.max())} tokens but was built for max_length="
                f"{self.dims.max_length}; build it with a larger max_length"
            )


def _features(x: Tensor, cosines: Cosines) -> Tensor:
    """(B, H, L, E) -> (B, H, L, 2 E), float32 or wider."""
    rectified = x.to(cosines.cosine.dtype).relu()
    return torch.cat((rectified * cosines.cosine, rectified * cosines.sine), dim=-1)


def _sum(k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
    """Σ φ(k) (v, 1)ᵀ over the valid keys, (B, H, 2 E, E + 1)."""
    return zero_keys(k, valid).mT @ torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
