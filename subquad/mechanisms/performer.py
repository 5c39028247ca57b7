"""Performer: linear attention with random features (FAVOR+), which estimate the softmax kernel.

Choromanski et al. 2020, "Rethinking Attention with Performers", arXiv:2009.14794.

    φ(x) = m^(-1/2) exp(Ω x' - |x'|²/2),  x' = x / E^(1/4)        o_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j φ(k_j)

Cost O(L F D) with F = m features, O(F D) state. Causal: j <= i. The estimate is good while |q|, |k| are small; its
error falls like F^(-1/2). Two other estimators, and the generalised kernel of ReLU with Ω or without, are options.

Departures: the signs of the orthogonal blocks are corrected; the official code leaves the bias of Householder QR in
(mean estimate 0.71 of the true kernel at E = 16 for positive vectors). Exponents are shifted by the largest one of the
query, and of the keys that the query sees: a running maximum in the causal form, where the official code takes that of
the whole sequence. No ε is added to the features of softmax, which would bias the estimate and, with the official
maximum, show the future; a query whose every weight underflows gives 0. Padding is left out of every sum and maximum.
ReLU features come from projected, scaled x as in the paper (`kernel="relu"`). The official code in JAX projects and
scales nothing (`kernel="plain_relu"`); that in TensorFlow is max(m^(-1/2) Ω x, 0) + ε, which is `kernel="relu"` with
`epsilon` times m^(1/2) E^(-1/4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from subquad.costs import Cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.layers.feature_sums import FeatureSumMixer, feature_sum_cost
from subquad.layers.heads import Heads
from subquad.ops.backward_pass import is_recomputing
from subquad.ops.features.maps import (
    FeatureMap,
    HyperbolicRandom,
    PlainRelu,
    PositiveRandom,
    ReluRandom,
    TrigonometricRandom,
)
from subquad.ops.features.random_features import random_directions
from subquad.registry import register
from subquad.state import State

_PAIRED = ("hyperbolic", "trigonometric")
"""Estimators with two features for each direction."""

_RECTIFIED = ("relu", "plain_relu")
"""Kernels of ReLU."""

_OF_DIRECTIONS = ("features", "directions", "norms", "redraw", "seed")
"""Options that say how Ω is drawn."""


@register("performer")
@dataclass(frozen=True, kw_only=True)
class PerformerConfig(MixerConfig):
    """Options of FAVOR+."""

    family: ClassVar[str] = "factorised"

    features: int = 256
    """F, random features per head; one matrix of directions serves all heads of a layer."""
    kernel: Literal["positive", "hyperbolic", "trigonometric", "relu", "plain_relu"] = "positive"
    """Softmax by positive features, by pairs of them for ±ω, or by cos and sin, whose weights have both signs and may
    sum to 0; or max(Ω x', 0) + ε, a kernel of its own, or max(x, 0) + ε without anything random, F = E."""
    directions: Literal["orthogonal", "independent"] = "orthogonal"
    """Rows of Ω orthogonal within blocks of E, which lowers the variance, or independent."""
    norms: Literal["random", "constant"] = "random"
    """Lengths of the rows: those of Gaussian vectors, or √E."""
    epsilon: float = 1e-3
    """ε of kernel="relu" and "plain_relu"."""
    redraw: int = 0
    """Training calls after which new features are drawn; 0 for never. A recompute inside a backward pass doesn't count;
    evaluation and calls with a state keep what was drawn last."""
    chunk: int = 64
    """Tokens per chunk of the causal form: speed only, the result doesn't depend on it."""
    seed: int = 0
    """Seeds the features, together with the layer and the number of the draw."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        self.check_least({"features": 1, "redraw": 0, "chunk": 1, "seed": 0, "epsilon": 0})
        if self.kernel in _PAIRED and self.features % 2:
            raise ValueError(
                f"performer: kernel={self.kernel!r} has two features for each direction, so features must be even; "
                f"got {self.features}, use {self.features - 1} or {self.features + 1}"
            )
        self._refuse_what_is_not_projected()

    def _refuse_what_is_not_projected(self) -> None:
        """Raise ValueError for options of directions where there are none."""
        defaults = {each.name: each.default for each in fields(self)}
        given = [name for name in _OF_DIRECTIONS if getattr(self, name) != defaults[name]]
        if given and not self.is_random:
            raise ValueError(
                f"performer: kernel='plain_relu' draws no directions, its features are the head_dim channels "
                f"themselves; leave out {', '.join(given)}, or choose kernel='relu', which projects"
            )

    @property
    def is_random(self) -> bool:
        """Whether there are directions."""
        return self.kernel != "plain_relu"

    @property
    def traits(self) -> Traits:
        """Sums over all keys can't tell documents apart, hence no segments."""
        return Traits(
            bidirectional=True,
            causal=True,
            cross=True,
            padding=True,
            state=True,
            constant_state=True,
            approximates_softmax=self.kernel not in _RECTIFIED,
        )

    @property
    def num_directions(self) -> int:
        """m, rows of Ω."""
        if not self.is_random:
            return 0
        return self.features // 2 if self.kernel in _PAIRED else self.features

    def build(self, dims: Dims) -> Performer:
        """The module."""
        return Performer(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """F features from m products, or the E channels from none."""
        return feature_sum_cost(
            dims,
            length,
            dtype_bytes,
            features=self.features if self.is_random else dims.head_dim,
            projected=self.num_directions,
            exponential=self.kernel not in _RECTIFIED,
            keeps_features=False,
            chunk=self.chunk,
        )


class Performer(FeatureSumMixer):
    """FAVOR+."""

    config: PerformerConfig
    directions: Tensor
    training_calls: Tensor

    def __init__(self, config: PerformerConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.chunk = config.chunk
        self.register_buffer("directions", self._draw(0).to(self.project_query.weight.dtype))
        self.register_buffer("training_calls", torch.zeros((), dtype=torch.int64))
        self._counted: Tensor | None = None  # `training_calls` as the latest call left it

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Draw anew where that is due, then attend."""
        if self.config.redraw and self.training and state is None and not self._is_counted():
            self._count_call()
        return super().attend(heads, state)

    def feature_map(self, dtype: torch.dtype) -> FeatureMap:
        """The kernel's, with the directions drawn last."""
        if not self.config.is_random:
            return PlainRelu(self.config.epsilon)
        directions = self.directions.to(dtype) * self.dims.head_dim**-0.25
        square_scale = self.dims.head_dim**-0.5
        if self.config.kernel == "relu":
            return ReluRandom(directions, square_scale, self.config.epsilon)
        maps = {"positive": PositiveRandom, "hyperbolic": HyperbolicRandom, "trigonometric": TrigonometricRandom}
        return maps[self.config.kernel](directions, square_scale)

    def denominator_epsilon(self, dtype: torch.dtype) -> float:
        """Makes 0 of 0 / 0 in a row without keys, with finite gradients, and changes nothing else."""
        return math.sqrt(torch.finfo(dtype).tiny)

    def _is_counted(self) -> bool:
        """Whether this call is run again and finds the buffers as the latest one left them, not as it found them."""
        return is_recomputing() and self.training_calls is self._counted

    def _count_call(self) -> None:
        """New directions after every `redraw` calls; out of place, since an earlier graph may still need the old."""
        draw, calls_since = divmod(int(self.training_calls), self.config.redraw)
        if draw and not calls_since:
            self.directions = self._draw(draw).to(self.directions)
        self.training_calls = self.training_calls + 1
        if not is_recomputing():
            self._counted = self.training_calls

    def _draw(self, draw: int) -> Tensor:
        """The directions of this draw, float64 (m, E): a function of (seed, layer, draw)."""
        config, seed = self.config, 0
        for number in (self.config.seed, self.dims.layer, draw):
            seed = (1_000_003 * seed + number) % 2**63
        return random_directions(
            config.num_directions,
            self.dims.head_dim,
            orthogonal=config.directions == "orthogonal",
            norms=config.norms,
            generator=torch.Generator().manual_seed(seed),
        )
