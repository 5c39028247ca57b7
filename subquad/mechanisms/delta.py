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
from subquad.interface import Dims, MixerConfig, Traits
from subquad.layers.heads import initialise_projection
from subquad.layers.projection import Projection
from subquad.layers.recurrent import (
    RecurrentHeads,
    RecurrentMixer,
    RecurrentState,
    check_chunk,
    delta_cost,
    recurrent_cost,
    refuse_rotary,
    scaled_width,
)
from subquad.mask import Mask
from subquad.ops.packing import packing_order, put_back, take
from subquad.ops.recomputed import recomputed
from subquad.ops.recurrence.short_convolution import short_convolution, unit_vectors
from subquad.registry import register
from subquad.state import State, state_dataclass


@register("delta")
@dataclass(frozen=True, kw_only=True)
class DeltaConfig(MixerConfig):
    """Options of DeltaNet and Gated DeltaNet."""

    family: ClassVar[str] = "recurrent"

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
        if self.kernel < 0:
            raise ValueError(f"delta: kernel counts the tokens of a convolution, 0 for none; got {self.kernel}")
        check_chunk("delta", self.chunk)

    @property
    def traits(self) -> Traits:
        """Causal alone; the matrix can't tell documents apart, hence no segments."""
        return Traits(causal=True, padding=True, state=True, constant_state=True)

    def check(self, dims: Dims) -> None:
        """Raise ValueError for rotary positions, or where an expansion gives no whole width."""
        refuse_rotary("delta", dims)
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

    def build(self, dims: Dims) -> Delta:
        """The module."""
        return Delta(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections, those of β and α, and the delta rule.

        Autograd keeps q, k and v before their convolution too, and for α what is projected for it.
        """
        heads, wide_bytes = self.heads(dims), max(4, dtype_bytes)
        channels = dims.num_heads * (2 * heads.width + heads.value_width)
        small = (1 + self.gated) * dims.embed_dim * dims.num_heads
        numbers = dims.num_heads * length * (self.negative_eigenvalues + self.gated)
        own = Cost(
            flops=2 * length * small,
            activation_bytes=dtype_bytes * length * (channels + dims.num_heads * self.gated) + wide_bytes * numbers,
            state_bytes=wide_bytes * max(0, self.kernel - 1) * channels,
            parameters=small + self.kernel * channels + 2 * dims.num_heads * self.gated,
        )
        recurrence = delta_cost(dims, heads, length, dtype_bytes, decay_width=0)
        return recurrent_cost(dims, heads, length, dtype_bytes) + recurrence + own


@state_dataclass
class DeltaState(RecurrentState):
    """The matrix, and what the convolution still sees.

    Attributes:
        length: int64 (B,).
        matrix: (B, H, E, Ev).
        recent: (B, K - 1, H * (2 E + Ev)), queries, keys and values before the convolution, the newest last.
    """

    recent: Tensor


class Delta(RecurrentMixer):
    """The delta rule."""

    config: DeltaConfig

    def __init__(self, config: DeltaConfig, dims: Dims) -> None:
        super().__init__(config, dims, config.heads(dims))
        heads = dims.num_heads
        self.channels = (heads * self.heads.width, heads * self.heads.width, heads * self.heads.value_width)
        self.taps = nn.Parameter(torch.empty(config.kernel, sum(self.channels))) if config.kernel else None
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
        """A gain of 1, taps as torch's convolutions have them, rates uniform to 16, steps log-uniform in 0.001..0.1."""
        super().initialise()
        if self.taps is not None:
            bound = self.config.kernel**-0.5
            nn.init.uniform_(self.taps, -bound, bound)
        if self.log_rate is not None and self.rate_bias is not None:
            self.log_rate.uniform_(0, 16).clamp_min_(1e-4).log_()
            steps = self.rate_bias.uniform_(math.log(0.001), math.log(0.1)).exp_()
            self.rate_bias.copy_(steps.expm1().log())  # softplus of it is the step

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> DeltaState:
        """Nothing seen yet."""
        length, matrix = self.empty_memory(batch_size, device, dtype)
        reach = max(0, self.config.kernel - 1)
        return DeltaState(length, matrix, matrix.new_zeros(batch_size, reach, sum(self.channels)))

    def recur(
        self, x: Tensor, qkv: tuple[Tensor, Tensor, Tensor], mask: Mask, state: State | None
    ) -> tuple[Tensor, State | None]:
        """Convolve, divide by lengths, and store by the delta rule; padding is taken out first."""
        valid = mask.valid
        order = packing_order(valid)
        if valid is not None and order is not None:
            x, *moved = (take(tensor[:, None], order)[:, 0] for tensor in (x, *qkv))
            qkv, mask = (moved[0], moved[1], moved[2]), Mask(take(valid, order))
        before = state if isinstance(state, DeltaState) else None
        q, k, v = self._prepare(qkv, before)
        out, after = self.remember(q, k, v, self._log_decays(x), mask, state, beta=self._beta(x))
        out = out if order is None else put_back(out, order)
        if before is None or after is None:
            return out, None
        return out, DeltaState(after.length, after.matrix, _newest(before.recent, qkv, mask.valid))

    def _prepare(self, qkv: tuple[Tensor, Tensor, Tensor], before: DeltaState | None) -> list[Tensor]:
        """Queries, keys and values in heads, float32 or wider, (B, H, L, ·)."""
        taps = [None] * 3 if self.taps is None else self.taps.split(self.channels, dim=1)
        past = [None] * 3 if before is None else before.recent.split(self.channels, dim=2)
        return [
            self.split(recomputed(partial(_activate, heads=self.dims.num_heads, unit=unit), x, own_taps, own_past))
            for x, own_taps, own_past, unit in zip(qkv, taps, past, (True, True, False), strict=True)
        ]

    def _beta(self, x: Tensor) -> Tensor:
        """β, (B, H, L)."""
        beta = self.project_beta(x)
        beta = beta.to(torch.promote_types(beta.dtype, torch.float32)).sigmoid().transpose(1, 2)
        return 2 * beta if self.config.negative_eigenvalues else beta

    def _log_decays(self, x: Tensor) -> Tensor | None:
        """Log α, (B, H, L, 1); None where α is 1."""
        if self.project_decay is None or self.log_rate is None or self.rate_bias is None:
            return None
        return self.split(recomputed(_log_decays, self.project_decay(x), self.log_rate, self.rate_bias))


def _activate(x: Tensor, taps: Tensor | None, past: Tensor | None, *, heads: int, unit: bool) -> Tensor:
    """Silu of x (B, L, C), convolved behind its past where there are taps, each head a unit vector or not."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, past = x.to(wide), None if past is None else past.to(wide)
    x = F.silu(x if taps is None else short_convolution(x, taps.to(wide), past))
    return unit_vectors(x.unflatten(-1, (heads, -1))).flatten(-2) if unit else x


def _log_decays(x: Tensor, log_rate: Tensor, bias: Tensor) -> Tensor:
    """-exp(A) softplus(x + b), x: (B, L, H), float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return -log_rate.to(wide).exp() * F.softplus(x.to(wide) + bias.to(wide))


def _newest(recent: Tensor, qkv: tuple[Tensor, ...], valid: Tensor | None) -> Tensor:
    """The last K - 1 valid tokens; the valid ones of this call stand in front."""
    tokens = torch.cat((recent, torch.cat(qkv, dim=2).to(recent.dtype)), dim=1)
    reach = recent.shape[1]
    if valid is None:
        return tokens[:, tokens.shape[1] - reach :]
    return take(tokens[:, None], valid.sum(dim=1, keepdim=True) + torch.arange(reach, device=valid.device))[:, 0]
