"""gMLP: no attention, but a learned matrix over positions that gates half of the hidden channels.

Liu et al. 2021, "Pay Attention to MLPs", arXiv:2105.08050.

    u = LN(x)      z₁, z₂ = GELU(u U)      y = x + (z₁ ⊙ (W LN(z₂) + b + a(u))) V      causal: W_ij = 0 for j > i
    W free, or W_ij = w_(i - j) with weights="toeplitz"; b has one number a token
    a(u) = 0, or in aMLP (attention_dim=64) softmax(q kᵀ / √E) v O with one head of that width

Cost O(L² D) time, with Toeplitz weights O(L log L D), causal O(L log² L D), by Fourier transforms; memory O(L D) beside
W itself. The raw stream goes in, and y is used as it is: the block owns norm, residual and channel mixing. It begins
with b = 1 and W ≈ 0, that is as a feed-forward. W's rows and columns are positions, so that none are added: shorter
input takes the first ones, and an invalid token takes none.

Departures: the paper is bidirectional; causal is W's lower triangle with its diagonal, as in re-implementations, and
then aMLP's attention is causal too. W, of which the paper says "near zero", is drawn from ±0.001 / max_length. It is
one for all channels, as in the paper; a W for each group of them, which a re-implementation has, isn't offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.calls import check_stream_length
from subquad.costs import Cost, visible_pairs
from subquad.interface import Dims, Mixed, MixerConfig, TokenMixer, Traits
from subquad.layers.heads import initialise_projection
from subquad.layers.projection import Projection
from subquad.mask import Mask
from subquad.ops.packing import Packing, append
from subquad.ops.positions.causal_toeplitz import causal_product_flops, causal_toeplitz_product
from subquad.ops.positions.toeplitz import toeplitz_product, transform_flops, transform_length
from subquad.ops.positions.token_product import token_product
from subquad.ops.precision import full_precision
from subquad.registry import register
from subquad.state import State, state_dataclass


@register("gmlp")
@dataclass(frozen=True, kw_only=True)
class GmlpConfig(MixerConfig):
    """Options of gMLP and aMLP."""

    family: ClassVar[str] = "attention-free"
    placement: ClassVar[Literal["sublayer", "block"]] = "block"
    why_not_rotary: ClassVar[str] = "its weights belong to positions"

    hidden_dim: int | None = None
    """F, channels of z₁ and z₂ together; None for 6 D."""
    weights: Literal["full", "toeplitz"] = "full"
    """W has a number for every pair of positions, or one for every distance."""
    attention_dim: int = 0
    """E, width of aMLP's attention, 64 in the paper; 0 for gMLP, which has none."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.hidden_dim is not None and (self.hidden_dim < 2 or self.hidden_dim % 2):
            raise ValueError(
                f"gmlp: hidden_dim is split into two halves, so it must be even and at least 2, got {self.hidden_dim}"
            )
        self.check_least({"attention_dim": 0})

    @property
    def traits(self) -> Traits:
        """Bound to a maximal length, since W belongs to positions."""
        return Traits(bidirectional=True, causal=True, padding=True, state=True, fixed_length=True)

    def half(self, dims: Dims) -> int:
        """F / 2, the channels that are gated."""
        return 3 * dims.embed_dim if self.hidden_dim is None else self.hidden_dim // 2

    def weight_shape(self, dims: Dims) -> tuple[int, ...]:
        """Of W: (max_length, max_length), or of w: one number for each distance that is seen."""
        if self.weights == "full":
            return dims.longest_input, dims.longest_input
        return (dims.longest_input if dims.causal else 2 * dims.longest_input - 1,)

    def build(self, dims: Dims) -> Gmlp:
        """The module."""
        return Gmlp(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Two projections and the visible pairs of W, or three transforms' worth of channels; aMLP's attention.

        Autograd keeps x, LN(x), the hidden layer before and after GELU, LN(z₂), the gates and what they let through.
        """
        width, half, pairs = dims.embed_dim, self.half(dims), visible_pairs(length, right=0 if dims.causal else None)
        mixing = 2 * pairs * half
        if self.weights == "toeplitz" and dims.causal:
            mixing = causal_product_flops(length, half) if length else 0
        elif self.weights == "toeplitz":
            mixing = (2 * half + 1) * transform_flops(transform_length(length)) if length else 0
        weights = torch.Size(self.weight_shape(dims)).numel() + dims.longest_input
        biases = 2 * half + width if dims.bias else 0
        stored = length * (half + 2 * self.attention_dim) if dims.causal else 0
        return self._attention_cost(dims, length, pairs, dtype_bytes) + Cost(
            flops=2 * length * 3 * width * half + mixing,
            activation_bytes=length * (dtype_bytes * (2 * width + 7 * half) + 4 * max(4, dtype_bytes)),
            state_bytes=stored * max(4, dtype_bytes),
            parameters=3 * width * half + biases + 2 * (width + half) + weights,
        )

    def _attention_cost(self, dims: Dims, length: int, pairs: int, dtype_bytes: int) -> Cost:
        """Autograd keeps q, k, v, the result and its log-sum-exp."""
        size, half = self.attention_dim, self.half(dims)
        if not size:
            return Cost()
        weights = size * (3 * dims.embed_dim + half)
        return Cost(
            flops=2 * length * weights + 2 * 2 * pairs * size,
            activation_bytes=length * (dtype_bytes * 4 * size + max(4, dtype_bytes)),
            parameters=weights + (3 * size + half if dims.bias else 0),
        )


@state_dataclass
class GateCache(State):
    """What later tokens read of earlier ones, without gaps.

    Attributes:
        length: int64 (B,).
        gates: (B, 1, T, F / 2), LN(z₂), T the largest length; columns from a row's length on are zeros.
        keys: (B, 1, T, E), of aMLP's attention; without it E is 0.
        values: (B, 1, T, E).
    """

    gates: Tensor
    keys: Tensor
    values: Tensor


class Reading(NamedTuple):
    """The tokens of a call and what they read.

    Attributes:
        gates: (B, 1, T, F / 2), LN(z₂).
        queries: (B, 1, L, E).
        keys: (B, 1, T, E).
        values: (B, 1, T, E).
    """

    gates: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor


class TinyAttention(nn.Module):
    """The projections of aMLP's single head."""

    def __init__(self, config: GmlpConfig, dims: Dims) -> None:
        super().__init__()
        self.project_in = Projection(dims.embed_dim, 3 * config.attention_dim, bias=dims.bias)
        self.project_out = Projection(config.attention_dim, config.half(dims), bias=dims.bias)
        for projection in (self.project_in, self.project_out):
            initialise_projection(projection)


class Gmlp(TokenMixer):
    """A feed-forward whose hidden channels are gated by a matrix over positions."""

    config: GmlpConfig

    def __init__(self, config: GmlpConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        half = config.half(dims)
        self.norm, self.gate_norm = nn.LayerNorm(dims.embed_dim), nn.LayerNorm(half)
        self.project_in = Projection(dims.embed_dim, 2 * half, bias=dims.bias)
        self.project_out = Projection(half, dims.embed_dim, bias=dims.bias)
        for projection in (self.project_in, self.project_out):
            initialise_projection(projection)
        self.token_weights = nn.Parameter(torch.empty(config.weight_shape(dims)))
        self.token_biases = nn.Parameter(torch.empty(dims.longest_input))
        self.attention = TinyAttention(config, dims) if config.attention_dim else None
        self.dropout = nn.Dropout(dims.dropout)
        self.initialise()

    def initialise(self) -> None:
        """Gates of about 1: the block begins as a feed-forward."""
        bound = 1e-3 / self.token_biases.shape[0]
        nn.init.uniform_(self.token_weights, -bound, bound)
        nn.init.ones_(self.token_biases)

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> GateCache:
        """Nothing seen yet."""
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        gates = torch.zeros(batch_size, 1, 0, self.config.half(self.dims), device=device, dtype=dtype)
        keys = torch.zeros(batch_size, 1, 0, self.config.attention_dim, device=device, dtype=dtype)
        return GateCache(length, gates, keys, keys.clone())

    def mix(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, context_mask: Mask | None, state: State | None
    ) -> Mixed:
        """Put the valid tokens first, so that they stand where they count; gate, and add to the stream."""
        facts = mask or Mask()
        packing = Packing(facts.valid)
        u, after = self.norm(packing.pack(x)), None
        passed, gating = F.gelu(self.project_in(u)).chunk(2, dim=-1)
        reading = self._read(u, gating)
        if isinstance(state, GateCache):
            gates, after = self._continue(reading, packing.valid, state)
        else:
            gates = self._gates(reading, packing.valid)
        return Mixed(x + self.dropout(packing.unpack(self.project_out(passed * gates))), after)

    def _read(self, u: Tensor, gating: Tensor) -> Reading:
        gates = self.gate_norm(gating)[:, None]
        if self.attention is None:
            nothing = gates[..., :0]
            return Reading(gates, nothing, nothing, nothing)
        return Reading(gates, *self.attention.project_in(u)[:, None].chunk(3, dim=-1))

    def _gates(self, reading: Reading, valid: Tensor | None) -> Tensor:
        """Gates (B, L, F / 2) of a whole sequence, where invalid tokens (bool (B, L)) stand last."""
        mixed, length, visible = reading.gates[:, 0], reading.gates.shape[2], None
        if valid is not None:
            mixed = mixed.masked_fill(~valid[..., None], 0.0)
            visible = None if self.dims.causal else valid[:, None, None]
        if self.config.weights == "full":
            mixed = token_product(self.token_weights[:length, :length], mixed, causal=self.dims.causal)
        elif self.dims.causal:
            mixed = causal_toeplitz_product(self.token_weights[:length], mixed)
        else:
            unused = len(self.token_biases) - length
            mixed = toeplitz_product(self.token_weights[unused : unused + 2 * length - 1], mixed)
        return self._attend(reading, mixed + self.token_biases[:length, None].to(mixed.dtype), visible)

    def _attend(self, reading: Reading, gates: Tensor, visible: Tensor | None) -> Tensor:
        """The gates and, in aMLP, what attention adds to them."""
        if self.attention is None:
            return gates
        causal = self.dims.causal and visible is None
        _, q, k, v = reading
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal)
        return gates + self.attention.project_out(out[:, 0])

    def _continue(self, reading: Reading, valid: Tensor | None, state: GateCache) -> tuple[Tensor, GateCache]:
        """Gates of the next tokens of a stream, of which the valid ones come first, and the longer cache."""
        length = reading.gates.shape[2]
        new_length = state.length + (length if valid is None else valid.sum(dim=1))
        capacity = max([state.gates.shape[2], *new_length.tolist()])
        check_stream_length("gmlp", new_length, self.dims.max_length)
        positions = state.length[:, None] + torch.arange(length, device=state.length.device)
        targets = positions.masked_fill(positions >= new_length[:, None], capacity)
        pairs = zip((state.gates, state.keys, state.values), (reading.gates, *reading[2:]), strict=True)
        cache = GateCache(new_length, *(append(old, new.to(old.dtype), targets, capacity) for old, new in pairs))
        positions = positions.clamp_max(len(self.token_biases) - 1)
        visible = torch.arange(capacity, device=positions.device) <= positions[..., None]
        with full_precision(positions.device):
            mixed = self._rows(positions, visible).to(cache.gates.dtype) @ cache.gates[:, 0]
            gates = (mixed + self.token_biases[positions][..., None]).to(reading.gates.dtype)
        dtype = reading.queries.dtype
        stored = reading._replace(keys=cache.keys.to(dtype), values=cache.values.to(dtype))
        return self._attend(stored, gates, visible[:, None]), cache

    def _rows(self, positions: Tensor, visible: Tensor) -> Tensor:
        """Rows of W at the positions (B, L), 0 but where visible (bool (B, L, T))."""
        count = visible.shape[2]
        if self.config.weights == "full":
            rows = self.token_weights[positions][..., :count]
        else:
            distances = positions[..., None] - torch.arange(count, device=positions.device)
            rows = self.token_weights[distances.clamp_min(0)]
        return rows.masked_fill(~visible, 0.0)
