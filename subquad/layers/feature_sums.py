"""Attention by features: what the mechanisms share that sum φ(k) vᵀ over keys and read the sums with φ(q).

    o_i = φ(q_i)ᵀ S / (φ(q_i)ᵀ z + ε)        S = Σ_j φ(k_j) v_jᵀ, z = Σ_j φ(k_j)        causal: j <= i

A mechanism derived from `FeatureSumMixer` names its feature map.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from subquad.costs import Cost
from subquad.interface import Dims
from subquad.layers.cache import reads_stored_context
from subquad.layers.heads import HeadMixer, Heads, projection_cost
from subquad.ops.features.causal import Settings, causal_sums, segments
from subquad.ops.features.maps import FeatureMap
from subquad.ops.features.sums import Sums, lowest, read_sums, sum_keys
from subquad.ops.precision import wide_dtype
from subquad.state import State, state_dataclass


@state_dataclass
class FeatureSums(State):
    """The sums over everything seen.

    Attributes:
        length: int64 (B,), valid tokens of x so far.
        filled: bool (B,), cross-attention: whether the context has been summed.
        values: (B, H, F, E), S exp(-c).
        features: (B, H, F), z exp(-c).
        reference: (B, H), c, the largest exponent of the features so far; without use where φ is no exponential.
    """

    filled: Tensor
    values: Tensor
    features: Tensor
    reference: Tensor


class FeatureSumMixer(HeadMixer):
    """Attention by features, in all its forms."""

    chunk: int
    """Tokens per chunk of the causal form."""

    @abstractmethod
    def feature_map(self, dtype: torch.dtype) -> FeatureMap:
        """φ, computed in this dtype."""

    @abstractmethod
    def denominator_epsilon(self, dtype: torch.dtype) -> float:
        """ε."""

    @property
    def num_features(self) -> int:
        """F."""
        return self.feature_map(torch.float32).count(self.dims.head_dim)

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> FeatureSums:
        """All sums 0."""
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        shape = batch_size, self.dims.num_heads, self.num_features, self.dims.head_dim
        values = torch.zeros(shape, device=device, dtype=dtype)
        features = values[..., 0].clone()
        return FeatureSums(length, length > 0, values, features, torch.full_like(features[..., 0], lowest(dtype)))

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Sum keys and values, read with the queries."""
        dtype = wide_dtype(heads.q)
        feature_map, epsilon = self.feature_map(dtype), self.denominator_epsilon(dtype)
        before = None
        if isinstance(state, FeatureSums):
            reference = state.reference.to(dtype) if feature_map.exponential else None
            before = Sums(state.values.to(dtype), state.features.to(dtype), reference)
        if self.dims.causal:
            k, v = heads.keys_and_values()
            settings = Settings(feature_map, epsilon, self.chunk)
            out, after = causal_sums(heads.q, k, v, before, settings, heads.mask.valid)
        else:
            after = self._sum_context(heads, before, state, feature_map)
            out = read_sums(heads.q, after, feature_map, epsilon=epsilon)
        return out, _next_state(state, heads, after) if isinstance(state, FeatureSums) else None

    def _sum_context(self, heads: Heads, before: Sums | None, state: State | None, feature_map: FeatureMap) -> Sums:
        """The sums over all keys, or those that the state of cross-attention holds."""
        if isinstance(state, FeatureSums) and reads_stored_context(self.config.name, state.filled, heads):
            assert before is not None
            return before
        k, v = heads.keys_and_values()
        return sum_keys(k, v, feature_map, heads.key_mask.valid)


def feature_sum_cost(
    dims: Dims,
    length: int,
    dtype_bytes: int,
    *,
    features: int,
    projected: int,
    exponential: bool,
    keeps_features: bool,
    chunk: int,
) -> Cost:
    """The price of attention by features, projections included.

    Every q and k is mapped, with `projected` products with directions and F features; keys are written to the sums and
    queries read from them, with denominators as one more column, into which causal keys write too; the causal form
    adds the pairs inside chunks. Other sums are elementwise work. Autograd keeps q and k, or `keeps_features` in their
    place, v and the merged heads, the denominators, the references of exponentials, and the sums, causally those before
    each segment.
    """
    heads, width, wide_bytes = dims.num_heads, dims.head_dim, max(4, dtype_bytes)
    sums, keys = features * (width + 1), dims.key_length(length)
    mapped, written = length + keys, sums if dims.causal else features * width
    flops, kept = 2 * mapped * projected * width + 2 * keys * written + 2 * length * sums, length
    if dims.causal:
        parts = [(tokens.stop - tokens.start, chunks) for tokens, chunks in segments(length, chunk)]
        flops += sum(2 * tokens * (tokens // chunks) * (features + width + 1) for tokens, chunks in parts)
        kept += len(parts) * sums + (length + 1 if exponential else 0)
    else:
        kept += sums + (1 if exponential else 0)
    state = sums + 1 if dims.causal or dims.cross else 0
    kept += mapped * features if keeps_features else 0
    return projection_cost(dims, length, dtype_bytes, kept="v" if keeps_features else "qkv") + Cost(
        flops=heads * flops,
        activation_bytes=wide_bytes * heads * kept if mapped else 0,
        state_bytes=wide_bytes * heads * state,
    )


def _next_state(state: FeatureSums, heads: Heads, sums: Sums) -> FeatureSums:
    length, valid, dtype = heads.q.shape[2], heads.mask.valid, state.values.dtype
    return FeatureSums(
        state.length + (length if valid is None else valid.sum(dim=1)),
        torch.ones_like(state.filled),
        sums.values.to(dtype),
        sums.features.to(dtype),
        state.reference if sums.reference is None else sums.reference.to(dtype),
    )
