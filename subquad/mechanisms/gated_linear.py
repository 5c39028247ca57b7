"""Gated linear: linear attention whose past fades by a gate for each channel of the key, computed from the token.

Yang et al. 2023, "Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv:2312.06635.

    S_t = diag(α_t) S_{t-1} + k_t v_tᵀ        o_t = S_tᵀ q_t        α_t = σ(x_t W_1 W_2 + b)^(1/τ)
    y_t = (norm(o_t) ⊙ swish(x_t W_g)) W_o
    kernel: q, k, v = silu of a convolution of the projections over K tokens, each channel for itself

Keys and queries are half as wide as values; there is no feature map. W_1 W_2 has rank 16 and τ = 16, so that at first
a channel keeps 96 % from token to token.

Cost O(L (C + E) D) with chunks of C tokens, O(E D) state, the last K - 1 tokens of a convolution included. Decays
inside a chunk are taken in log space, and pairs that decay too much for one matrix product are computed in halves of
the chunk, so that no gate overflows.

Departures: the norm is the RMSNorm of the published code, with a gain; the paper writes LayerNorm (`norm="layer"`, here
with a gain and no bias). The convolution is an option of the published code, off as there; the paper has none. An
invalid token takes no place in it. No factor 1/√E on queries, which the norm would cancel; the published code has one.
Packed documents are refused: a matrix can't tell them apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from subquad.costs import Cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.layers.convolved import Channels, ConvolvedMixer, activate, check_kernel, convolution_cost
from subquad.layers.heads import initialise_projection
from subquad.layers.projection import Projection
from subquad.layers.recurrent import (
    RecurrentHeads,
    RecurrentState,
    additive_cost,
    check_chunk,
    recurrent_cost,
    scaled_width,
)
from subquad.mask import Mask
from subquad.ops.precision import wide_dtype
from subquad.ops.projection import project
from subquad.ops.recomputed import recomputed
from subquad.registry import register
from subquad.state import State


@register("gated_linear")
@dataclass(frozen=True, kw_only=True)
class GatedLinearConfig(MixerConfig):
    """Options of gated linear attention."""

    family: ClassVar[str] = "recurrent"
    why_not_rotary: ClassVar[str] = "its decay knows the order"

    key_expansion: float = 0.5
    """Width of a query's and key's head in units of head_dim."""
    value_expansion: float = 1.0
    """Width of a value's head in units of head_dim."""
    rank: int = 16
    """Width between the two matrices of the forget gate."""
    temperature: float = 16.0
    """τ: the larger, the slower the past fades."""
    norm: Literal["rms", "layer"] = "rms"
    """Norm of each head of the result: RMSNorm, or LayerNorm, which subtracts the mean; both with a gain."""
    gate: bool = True
    """Multiply the normed result by swish(x W_g)."""
    kernel: int = 0
    """K, tokens that a convolution of queries, keys and values sees, itself included; 0 for none."""
    chunk: int = 32
    """Tokens per chunk, rounded down to a power of two: speed only, the result doesn't depend on it."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        self.check_least({"rank": 1})
        if self.temperature <= 0:
            raise ValueError(f"gated_linear: temperature must be above 0, got {self.temperature}")
        check_kernel("gated_linear", self.kernel)
        check_chunk("gated_linear", self.chunk)

    @property
    def traits(self) -> Traits:
        """Causal alone; the matrix can't tell documents apart, hence no segments."""
        return Traits(causal=True, padding=True, state=True, constant_state=True)

    def check(self, dims: Dims) -> None:
        """Raise ValueError where an expansion gives no whole width."""
        self.heads(dims)

    def heads(self, dims: Dims) -> RecurrentHeads:
        """Keys are narrower than values."""
        return RecurrentHeads(
            width=scaled_width("gated_linear", "key_expansion", self.key_expansion, dims),
            value_width=scaled_width("gated_linear", "value_expansion", self.value_expansion, dims),
            centred=self.norm == "layer",
            gain=True,
            gate=self.gate,
            chunk=self.chunk,
        )

    def build(self, dims: Dims) -> GatedLinear:
        """The module."""
        return GatedLinear(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections, the two matrices of the forget gate, and the additive recurrence; log α is kept with q, k, v."""
        heads = self.heads(dims)
        keys = dims.num_heads * heads.width
        weights = self.rank * (dims.embed_dim + keys)
        own = Cost(
            flops=2 * length * weights, activation_bytes=dtype_bytes * length * self.rank, parameters=weights + keys
        )
        if self.kernel:
            own += convolution_cost(dims, heads, length, dtype_bytes, kernel=self.kernel)
        recurrence = additive_cost(dims, heads, length, dtype_bytes, decay_width=heads.width)
        return recurrent_cost(dims, heads, length, dtype_bytes) + recurrence + own


class GatedLinear(ConvolvedMixer):
    """Gated linear attention."""

    config: GatedLinearConfig

    def __init__(self, config: GatedLinearConfig, dims: Dims) -> None:
        super().__init__(config, dims, config.heads(dims), config.kernel)
        self.narrow_forget = Projection(dims.embed_dim, config.rank, bias=False)
        self.project_forget = Projection(config.rank, dims.num_heads * self.heads.width)
        for projection in (self.narrow_forget, self.project_forget):
            initialise_projection(projection)
        self.initialise()

    def prepare(self, queries: Channels, keys: Channels, values: Channels) -> tuple[Tensor, Tensor, Tensor]:
        """Convolved and activated; as they are without a convolution."""
        if self.taps is None:
            return queries.x, keys.x, values.x
        return recomputed(activate, *queries), recomputed(activate, *keys), recomputed(activate, *values)

    def recur_prepared(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, state: State | None
    ) -> tuple[Tensor, RecurrentState | None]:
        """Forget by channels."""
        return self.run_recurrence(q, k, v, self._log_decays(x), mask, state)

    def _log_decays(self, x: Tensor) -> Tensor:
        """Log α, (B, H, L, E)."""
        project = self.project_forget
        log_gates = partial(_log_gates, temperature=self.config.temperature)
        return self.split(recomputed(log_gates, self.narrow_forget(x), project.weight, project.bias))


def _log_gates(x: Tensor, weight: Tensor, bias: Tensor, *, temperature: float) -> Tensor:
    """Log σ(x W + b) / τ, float32 or wider."""
    wide = wide_dtype(x)
    return F.logsigmoid(project(x.to(wide), weight.to(wide), bias.to(wide))) / temperature
