"""Performer: linear attention with positive orthogonal random features (FAVOR+), which estimate the softmax kernel.

Choromanski et al. 2020, "Rethinking Attention with Performers", arXiv:2009.14794.

    φ(x) = m^(-1/2) exp(Ω x' - |x'|²/2),  x' = x / E^(1/4)        o_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j φ(k_j)

Cost O(L F D) with F = m features. The estimate is good while |q|, |k| are small; its error falls like F^(-1/2).

Departures: the signs of the orthogonal blocks are corrected; the official code leaves the bias of Householder QR in
(mean estimate 0.71 of the true kernel at E = 16 for positive vectors). Exponents are shifted by a maximum per query,
and per sequence for keys, as in the official code; that maximum sees the future, so this form is bidirectional. Padding
is left out of it and of every sum. Features are drawn once, from (seed, layer), and saved with the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from subquad.costs import Cost
from subquad.heads import HeadMixer, Heads, projection_cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.ops.features import key_features, orthogonal_features, query_features
from subquad.ops.linear import all_sums, read_sums
from subquad.ops.precision import full_precision
from subquad.registry import register
from subquad.state import State


@register("performer")
@dataclass(frozen=True, kw_only=True)
class PerformerConfig(MixerConfig):
    """Options of FAVOR+ with softmax features."""

    family: ClassVar[str] = "factorised"

    features: int = 256
    """m, random features per head; one matrix serves all heads of a layer."""
    norms: Literal["random", "constant"] = "random"
    """Lengths of the feature vectors: those of Gaussian vectors, or √E."""
    epsilon: float = 1e-6
    """Added to every feature, the official code's guard against an empty sum."""
    seed: int = 0
    """Seeds the features, together with the layer."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.features < 1:
            raise ValueError(f"performer: features must be at least 1, got {self.features}")
        if self.epsilon < 0:
            raise ValueError(f"performer: epsilon must not be negative, got {self.epsilon}")
        if self.seed < 0:
            raise ValueError(f"performer: seed must not be negative, got {self.seed}")

    @property
    def traits(self) -> Traits:
        """Not causal: the stabiliser of the keys looks at the whole sequence."""
        return Traits(bidirectional=True, cross=True, padding=True, approximates_softmax=True)

    def build(self, dims: Dims) -> Performer:
        """The module."""
        return Performer(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Random projections of q and k, one product to write and one to read the sums, and the denominator.

        Autograd keeps, besides the projections, φ of q and k before and after ε, the scaled k, v, the sums, and the
        fraction. A context is as long as x.
        """
        mapped, sums = length * self.features * dims.num_heads, self.features * (dims.inner_dim + dims.num_heads)
        kept = 4 * mapped + length * (3 * dims.inner_dim + dims.num_heads) + sums
        return projection_cost(dims, length, dtype_bytes, kept=0) + Cost(
            flops=2 * mapped * (4 * dims.head_dim + 1), activation_bytes=max(4, dtype_bytes) * kept
        )


class Performer(HeadMixer):
    """FAVOR+, bidirectional."""

    config: PerformerConfig
    directions: Tensor

    def __init__(self, config: PerformerConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + dims.layer)
        directions = orthogonal_features(config.features, dims.head_dim, norms=config.norms, generator=generator)
        self.register_buffer("directions", directions.to(self.project_query.weight.dtype))

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Map queries and keys to features, then attend linearly; never narrowed by autocast."""
        with full_precision(heads.q.device):
            return self._attend_wide(heads), None

    def _attend_wide(self, heads: Heads) -> Tensor:
        assert heads.k is not None
        assert heads.v is not None
        wide = torch.promote_types(heads.q.dtype, torch.float32)
        scale = self.dims.head_dim**-0.25
        directions, epsilon = self.directions.to(wide), self.config.epsilon
        q = query_features(heads.q.to(wide) * scale, directions, epsilon=epsilon)
        k = key_features(heads.k.to(wide) * scale, directions, epsilon=epsilon, valid=heads.key_mask.valid)
        # Makes 0 of 0 / 0 in an example without valid keys, with finite gradients, and changes nothing else.
        smallest = torch.finfo(wide).tiny ** 0.5
        return read_sums(q, all_sums(k, heads.v.to(wide)), epsilon=smallest)
