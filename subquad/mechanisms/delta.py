"""Delta: a linear recurrence that replaces what its matrix returns for a key, instead of adding to it.

Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", arXiv:2406.06484;
with `gated=True` Yang et al. 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv:2412.06464.

    S_t = α_t S_{t-1} + β_t k_t (v_t - α_t S_{t-1}ᵀ k_t)ᵀ        o_t = S_tᵀ q_t        β_t = σ(x_t W_β), α_t = 1
    q, k: silu of a convolution of the projections over K tokens, divided by their lengths; v: the same, not divided
    y_t = RMSNorm(o_t) W_o
    gated: log α_t = -exp(A) softplus(x_t W_α + b), a number for each head; RMSNorm(o_t) ⊙ swish(x_t W_g)

Unit keys and β <= 2 keep the matrix from growing; β = 1 stores a value exactly, and orthonormal keys don't disturb
each other.

Cost O(L (C + E) D) with chunks of C tokens, O(E D) state, the last K - 1 tokens included.

Departures: the gated paper's layer has heads of 256 channels and values twice as wide as keys (`value_expansion=2`);
here widths are those asked for. No factor 1/√E on queries, which the norm would cancel; the published code has one. An
invalid token takes no place in the convolution. Packed documents are refused: a matrix can't tell them apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.interface import Comparison, Dims, MixerConfig, Traits
from subquad.layers.convolved import Channels, ConvolvedMixer, activate, check_kernel, convolution_cost
from subquad.layers.heads import initialise_projection
from subquad.layers.projection import Projection
from subquad.layers.recurrent import (
    RecurrentHeads,
    RecurrentState,
    check_chunk,
    delta_cost,
    recurrent_cost,
    scaled_width,
)
from subquad.mask import Mask
from subquad.ops.precision import wide_dtype
from subquad.ops.recomputed import recomputed
from subquad.ops.recurrence.short_convolution import unit_vectors
from subquad.registry import register
from subquad.state import State


@register("delta")
@dataclass(frozen=True, kw_only=True)
class DeltaConfig(MixerConfig):
    """Options of DeltaNet and Gated DeltaNet."""

    family: ClassVar[str] = "recurrent"
    why_not_rotary: ClassVar[str] = "its decay knows the order"

    gated: bool = False
    """Gated DeltaNet: the matrix fades by α, and the normed result is multiplied by swish(x W_g)."""
    kernel: int = 4
    """K, tokens that the convolution of queries, keys and values sees, itself included; 0 for no convolution."""
    negative_eigenvalues: bool = False
    """β in (0, 2) instead of (0, 1), so that a token may turn around what is stored for its key."""
    key_expansion: float = 1.0
    """Width of a query's and key's head in units of head_dim."""
    value_expansion: float = 1.0
    """Width of a value's head in units of head_dim."""
    chunk: int = 32
    """Tokens per chunk, rounded down to a power of two: speed only, the result doesn't depend on it."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        check_kernel("delta", self.kernel)
        check_chunk("delta", self.chunk)

    @property
    def traits(self) -> Traits:
        """Causal alone; the matrix can't tell documents apart, hence no segments."""
        return Traits(causal=True, padding=True, state=True, constant_state=True)

    def check(self, dims: Dims) -> None:
        """Raise ValueError where an expansion gives no whole width."""
        self.heads(dims)

    def heads(self, dims: Dims) -> RecurrentHeads:
        """An RMSNorm with a gain; a gate where α is learned too."""
        return RecurrentHeads(
            width=scaled_width("delta", "key_expansion", self.key_expansion, dims),
            value_width=scaled_width("delta", "value_expansion", self.value_expansion, dims),
            centred=False,
            gain=True,
            gate=self.gated,
            chunk=self.chunk,
        )

    def comparison(self, dims: Dims, length: int) -> Comparison:
        """Nothing is left out, but what is learned is random."""
        del dims, length
        convolves, sets = "convolves tokens and " if self.kernel else "", "β, α and the gate" if self.gated else "β"
        return Comparison(self, note=f"What {convolves}sets {sets} is random until it is trained.")

    def build(self, dims: Dims) -> Delta:
        """The module."""
        return Delta(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections, those of β and α, the convolution, and the delta rule.

        Autograd keeps for α what is projected for it, too.
        """
        heads, wide_bytes = self.heads(dims), max(4, dtype_bytes)
        small = (1 + self.gated) * dims.embed_dim * dims.num_heads
        numbers = dims.num_heads * length * (self.negative_eigenvalues + self.gated)
        own = Cost(
            flops=2 * length * small,
            activation_bytes=dtype_bytes * length * dims.num_heads * self.gated + wide_bytes * numbers,
            parameters=small + 2 * dims.num_heads * self.gated,
        )
        own += convolution_cost(dims, heads, length, dtype_bytes, kernel=self.kernel)
        recurrence = delta_cost(dims, heads, length, dtype_bytes, decay_width=0)
        return recurrent_cost(dims, heads, length, dtype_bytes) + recurrence + own


class Delta(ConvolvedMixer):
    """The delta rule."""

    config: DeltaConfig

    def __init__(self, config: DeltaConfig, dims: Dims) -> None:
        super().__init__(config, dims, config.heads(dims), config.kernel)
        heads = dims.num_heads
        self.project_beta = Projection(dims.embed_dim, heads, bias=False)
        self.project_decay = Projection(dims.embed_dim, heads, bias=False) if config.gated else None
        self.log_rate = nn.Parameter(torch.empty(heads)) if config.gated else None
        self.rate_bias = nn.Parameter(torch.empty(heads)) if config.gated else None
        for projection in (self.project_beta, self.project_decay):
            if projection is not None:
                initialise_projection(projection)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Rates uniform to 16, steps log-uniform in 0.001..0.1; gain and taps as ever."""
        super().initialise()
        if self.log_rate is not None and self.rate_bias is not None:
            self.log_rate.uniform_(0, 16).clamp_min_(1e-4).log_()
            steps = self.rate_bias.uniform_(math.log(0.001), math.log(0.1)).exp_()
            self.rate_bias.copy_(steps.expm1().log())  # softplus of it is the step

    def prepare(self, queries: Channels, keys: Channels, values: Channels) -> tuple[Tensor, Tensor, Tensor]:
        """Convolve, and divide queries and keys by their lengths."""
        unit = partial(_activate_to_units, heads=self.dims.num_heads)
        return recomputed(unit, *queries), recomputed(unit, *keys), recomputed(activate, *values)

    def recur_prepared(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, state: State | None
    ) -> tuple[Tensor, RecurrentState | None]:
        """Store by the delta rule."""
        return self.run_recurrence(q, k, v, self._log_decays(x), mask, state, beta=self._beta(x))

    def _beta(self, x: Tensor) -> Tensor:
        """β, (B, H, L)."""
        beta = self.project_beta(x)
        beta = beta.to(wide_dtype(beta)).sigmoid().transpose(1, 2)
        return 2 * beta if self.config.negative_eigenvalues else beta

    def _log_decays(self, x: Tensor) -> Tensor | None:
        """Log α, (B, H, L, 1); None where α is 1."""
        if self.project_decay is None or self.log_rate is None or self.rate_bias is None:
            return None
        return self.split(recomputed(_log_decays, self.project_decay(x), self.log_rate, self.rate_bias))


def _activate_to_units(x: Tensor, taps: Tensor | None, past: Tensor | None, *, heads: int) -> Tensor:
    """`activate`, each head of each token divided by its length."""
    return unit_vectors(activate(x, taps, past).unflatten(-1, (heads, -1))).flatten(-2)


def _log_decays(x: Tensor, log_rate: Tensor, bias: Tensor) -> Tensor:
    """-exp(A) softplus(x + b), x: (B, L, H), float32 or wider."""
    wide = wide_dtype(x)
    return -log_rate.to(wide).exp() * F.softplus(x.to(wide) + bias.to(wide))
