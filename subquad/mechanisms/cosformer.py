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

from subquad.calls import check_stream_length
from subquad.costs import Cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.layers.feature_sums import FeatureSumMixer, feature_sum_cost
from subquad.layers.heads import BY_HEADS, Heads
from subquad.mask import Mask, token_positions
from subquad.ops.features.attention import DENOMINATOR_EPSILON
from subquad.ops.features.causal import CHUNK
from subquad.ops.features.maps import FeatureMap, Ready
from subquad.ops.precision import full_precision, wide_dtype
from subquad.registry import register
from subquad.state import State


@register("cosformer")
@dataclass(frozen=True, kw_only=True)
class CosformerConfig(MixerConfig):
    """cosFormer has no options."""

    family: ClassVar[str] = "factorised"
    why_not_rotary: ClassVar[str] = "it has positions of its own, in the weights"

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

    def build(self, dims: Dims) -> Cosformer:
        """The module."""
        return Cosformer(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """As linear attention with twice as many features as channels.

        Autograd keeps relu of q and k, and cosines and sines, besides what it keeps of features.
        """
        inner, keys, wide_bytes = dims.inner_dim, dims.key_length(length), max(4, dtype_bytes)
        price = feature_sum_cost(
            dims,
            length,
            dtype_bytes,
            features=2 * dims.head_dim,
            projected=0,
            exponential=False,
            keeps_features=True,
            chunk=CHUNK,
        )
        rectified, tables = (length + keys) * inner, 2 * (length + keys if dims.cross else length)
        of_values = wide_bytes * (length + keys) - dtype_bytes * keys  # v and the result, in place of v as projected
        widened = 0 if dtype_bytes >= 4 else of_values * inner
        return price + Cost(activation_bytes=wide_bytes * (rectified + tables) + widened)


class Cosines(NamedTuple):
    """Cosine and sine of π i / 2M for each token, (B, 1, L, 1), float32 or wider."""

    cosine: Tensor
    sine: Tensor


class Cosformer(FeatureSumMixer):
    """Linear attention weighted by the cosine of the distance."""

    parting = BY_HEADS
    config: CosformerConfig
    chunk = CHUNK

    @property
    def num_features(self) -> int:
        """Two for each channel."""
        return 2 * self.dims.head_dim

    def feature_map(self, dtype: torch.dtype) -> FeatureMap:
        """None: what is summed are features already, since they depend on positions."""
        return Ready()

    def denominator_epsilon(self, dtype: torch.dtype) -> float:
        """That of linear attention."""
        return DENOMINATOR_EPSILON

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Weigh by the positions, then sum; never narrowed by autocast."""
        start, k, v = None if state is None else state.length, heads.k, heads.v
        if start is not None:
            added = heads.q.shape[2] if heads.mask.valid is None else heads.mask.valid.sum(dim=1)
            check_stream_length("cosformer", start + added, self.dims.max_length)
        with full_precision(heads.q.device):
            cosines = self._cosines(heads.q, heads.mask, start)
            q = _features(heads.q, cosines)
            if k is not None and v is not None:
                k = _features(k, self._cosines(k, heads.key_mask, None) if self.dims.cross else cosines)
                v = v.to(k.dtype)
            return super().attend(heads._replace(q=q, k=k, v=v), state)

    def _cosines(self, x: Tensor, mask: Mask, start: Tensor | None) -> Cosines:
        """Of the positions of the tokens of x (B, H, L, E); angles are computed in float64."""
        positions = token_positions(mask, x.shape[0], x.shape[2], device=x.device, start=start)
        angles = positions[:, None, :, None].double() * (math.pi / (2 * self.dims.longest_input))
        wide = wide_dtype(x)
        return Cosines(angles.cos().to(wide), angles.sin().to(wide))


def _features(x: Tensor, cosines: Cosines) -> Tensor:
    """(B, H, L, E) -> (B, H, L, 2 E), float32 or wider."""
    rectified = x.to(cosines.cosine.dtype).relu()
    return torch.cat((rectified * cosines.cosine, rectified * cosines.sine), dim=-1)
