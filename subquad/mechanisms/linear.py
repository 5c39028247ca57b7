"""Linear: attention with the kernel φ(q)·φ(k), φ = elu + 1, in place of the softmax; causally, a recurrent network.

Katharopoulos et al. 2020, "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
arXiv:2006.16236.

    o_i = φ(q_i)ᵀ S / (φ(q_i)ᵀ z + ε)        S = Σ_j φ(k_j) v_jᵀ, z = Σ_j φ(k_j)        causal: j <= i

Cost O(L E D) time, O(E D) state. No 1/√E and no normalisation of q and k. It does not approximate softmax attention.

Departures: φ is computed as exp(x) below 0, where the official `elu(x) + 1` cancels to 0 in low precision; sums are
kept in float32 or wider; the causal form runs in chunks, exactly, where the official code scans token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from subquad.costs import Cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.layers.feature_sums import FeatureSumMixer, feature_sum_cost
from subquad.layers.heads import BY_HEADS
from subquad.ops.features.attention import DENOMINATOR_EPSILON
from subquad.ops.features.maps import EluPlusOne, FeatureMap
from subquad.registry import register


@register("linear")
@dataclass(frozen=True, kw_only=True)
class LinearConfig(MixerConfig):
    """Options of the Linear Transformer."""

    family: ClassVar[str] = "factorised"

    chunk: int = 64
    """Tokens per chunk of the causal form: speed only, the result doesn't depend on it."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        self.check_least({"chunk": 1})

    @property
    def traits(self) -> Traits:
        """Sums over all keys can't tell documents apart, hence no segments."""
        return Traits(bidirectional=True, causal=True, cross=True, padding=True, state=True, constant_state=True)

    def build(self, dims: Dims) -> Linear:
        """The module."""
        return Linear(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """E features, which cost no product."""
        return feature_sum_cost(
            dims,
            length,
            dtype_bytes,
            features=dims.head_dim,
            projected=0,
            exponential=False,
            keeps_features=False,
            chunk=self.chunk,
        )


class Linear(FeatureSumMixer):
    """Linear attention with φ = elu + 1."""

    parting = BY_HEADS
    config: LinearConfig

    def __init__(self, config: LinearConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.chunk = config.chunk

    def feature_map(self, dtype: torch.dtype) -> FeatureMap:
        """Elu + 1."""
        return EluPlusOne()

    def denominator_epsilon(self, dtype: torch.dtype) -> float:
        """The official code's."""
        return DENOMINATOR_EPSILON
