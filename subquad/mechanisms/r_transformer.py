"""R-Transformer: a recurrent network over a short window in front of each causal attention, in place of positions.

Wang et al. 2019, "R-Transformer: Recurrent Neural Network Enhanced Transformer", arXiv:1907.05572.

    x ← x + LocalRNN(LN(x))      N times; the last state of an RNN, GRU or LSTM, from 0, over u_(t-M+1) .. u_t
    x ← x + Attention(LN(x))     H heads, keys j <= i, softmax(q kᵀ / √E) v W_o
    y = x + W₂ relu(W₁ LN(x) + b₁) + b₂

Cost O(L² D) of attention beside O(L M D²) of N local networks, in M steps that don't depend on L; memory O(L D), since
windows are run again in the backward pass. Causal alone, as in the paper. The raw stream goes in, and y is used as it
is: the block owns norms, residuals and feed-forward. Tokens before the first count as u = 0. The state holds keys and
values, and the last M - 1 tokens u of each local network.

Departures: norms stand before each part, as in the official code. Its norm divides by the unbiased deviation plus 1e-6;
here it is the usual one. There all projections of the attention begin equal, and so do the N local networks, being
copies of one; here each is drawn by itself. Attention weights are never dropped. x is projected once for all windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.costs import Cost, visible_pairs
from subquad.interface import Dims, Mixed, MixerConfig, TokenMixer, Traits
from subquad.layers.cache import KeyValueCache, attend_cached, empty_cache
from subquad.layers.heads import Heads, attention_cost, initialise_projection, projection_cost
from subquad.layers.projection import Projection
from subquad.mask import Mask
from subquad.ops.head_split import merge_heads, split_heads
from subquad.ops.local_recurrence.network import GATES, CellName, local_recurrence
from subquad.ops.packing import Packing, take
from subquad.patterns.bands import Causal
from subquad.registry import register
from subquad.state import State, state_dataclass


@register("r_transformer")
@dataclass(frozen=True, kw_only=True)
class RTransformerConfig(MixerConfig):
    """Options of R-Transformer."""

    family: ClassVar[str] = "recurrent"
    placement: ClassVar[Literal["sublayer", "block"]] = "block"
    why_not_rotary: ClassVar[str] = "its windows stand for positions"

    cell: CellName = "gru"
    """The local network."""
    window: int = 7
    """M, tokens that it reads, the own one included."""
    local_layers: int = 1
    """N, local networks in front of the attention; 0 leaves a Transformer without positions."""
    hidden_dim: int | None = None
    """F, hidden width of the feed-forward; None for 4 D."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        self.check_least({"window": 1, "local_layers": 0, "hidden_dim": 1})

    @property
    def traits(self) -> Traits:
        """Causal alone; documents would need windows and caches that end with them."""
        return Traits(causal=True, padding=True, state=True)

    def width(self, dims: Dims) -> int:
        """F."""
        return 4 * dims.embed_dim if self.hidden_dim is None else self.hidden_dim

    def build(self, dims: Dims) -> RTransformer:
        """The module."""
        return RTransformer(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Attention, feed-forward and local networks, each with its norm; the state is kept once for all windows."""
        width, hidden, wide = dims.embed_dim, self.width(dims), max(4, dtype_bytes)
        pairs = visible_pairs(length, right=0)
        norm = Cost(activation_bytes=length * (dtype_bytes * width + 2 * wide), parameters=2 * width)
        feedforward = Cost(
            flops=2 * 2 * length * width * hidden,
            activation_bytes=dtype_bytes * length * (width + hidden),
            parameters=2 * width * hidden + hidden + width,
        )
        attention = projection_cost(dims, length, dtype_bytes) + attention_cost(dims, length, pairs, dtype_bytes)
        state = Cost(state_bytes=2 * length * dims.inner_dim * wide)
        local = self._local_cost(dims, length, dtype_bytes) + norm
        return attention + norm + feedforward + norm + state + self.local_layers * local

    def _local_cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """One product a token and M - 1 a window; autograd keeps the tokens and those before them, also projected."""
        width, before = dims.embed_dim, self.window - 1
        gates, tokens = GATES[self.cell] * width, length + before if length else 0
        return Cost(
            flops=2 * gates * width * (tokens + before * length),
            activation_bytes=dtype_bytes * tokens * (width + gates),
            state_bytes=max(4, dtype_bytes) * before * width,
            parameters=2 * gates * width + (2 * gates if dims.bias else 0),
        )


@state_dataclass
class RTransformerState(State):
    """Keys and values of all valid tokens so far, as in a `KeyValueCache`, and what the next windows begin with.

    Attributes:
        length: int64 (B,).
        keys: (B, H, T, E).
        values: (B, H, T, E).
        segments: int64 (B, T).
        recent: (B, N, M - 1, D), the last inputs of each local network; zeros before the first token.
    """

    keys: Tensor
    values: Tensor
    segments: Tensor
    recent: Tensor


class LocalNetwork(nn.Module):
    """The recurrent network over windows, and its norm."""

    def __init__(self, config: RTransformerConfig, dims: Dims) -> None:
        super().__init__()
        self.cell: CellName = config.cell
        self.window = config.window
        gates = GATES[config.cell] * dims.embed_dim
        self.norm = nn.LayerNorm(dims.embed_dim)
        self.project_input = Projection(dims.embed_dim, gates, bias=dims.bias)
        self.weights = nn.Parameter(torch.empty(gates, dims.embed_dim))
        self.biases = nn.Parameter(torch.empty(gates)) if dims.bias else None
        initialise_projection(self.project_input)

    def initialise(self) -> None:
        """As torch's cells: uniform within 1 / √D."""
        bound = self.weights.shape[1] ** -0.5
        for parameter in (self.weights, self.biases):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, recent: Tensor | None) -> tuple[Tensor, Tensor]:
        """The last states (B, L, D) of all windows, and the inputs (B, M - 1 + L, D), the recent ones first."""
        u = self.norm(x)
        before = u.new_zeros(len(u), self.window - 1, u.shape[2]) if recent is None else recent.to(u.dtype)
        tokens = torch.cat((before, u), dim=1)
        given = self.project_input(tokens)
        return local_recurrence(given, self.weights, self.biases, cell=self.cell, window=self.window), tokens


class RTransformer(TokenMixer):
    """Local recurrent networks, causal attention, feed-forward."""

    config: RTransformerConfig

    def __init__(self, config: RTransformerConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        width, inner, hidden = dims.embed_dim, dims.inner_dim, config.width(dims)
        self.local_networks = nn.ModuleList(LocalNetwork(config, dims) for _ in range(config.local_layers))
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project_query = Projection(width, inner, bias=dims.bias)
        self.project_key = Projection(width, inner, bias=dims.bias)
        self.project_value = Projection(width, inner, bias=dims.bias)
        self.project_out = Projection(inner, width, bias=dims.bias)
        self.expand, self.contract = Projection(width, hidden), Projection(hidden, width)
        for projection in (self.project_query, self.project_key, self.project_value, self.project_out):
            initialise_projection(projection)
        for projection in (self.expand, self.contract):
            initialise_projection(projection)
        self.dropout = nn.Dropout(dims.dropout)
        self.initialise()

    def initialise(self) -> None:
        """Draw what the local networks have beside projections."""
        for network in self._networks():
            network.initialise()

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> RTransformerState:
        """Nothing seen yet."""
        cache, config = empty_cache(self.dims, batch_size, device, dtype), self.config
        shape = (batch_size, config.local_layers, config.window - 1, self.dims.embed_dim)
        recent = torch.zeros(shape, device=device, dtype=dtype)
        return RTransformerState(cache.length, cache.keys, cache.values, cache.segments, recent)

    def mix(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, context_mask: Mask | None, state: State | None
    ) -> Mixed:
        """Put the valid tokens first, so that none reads an invalid one, and run the parts."""
        facts = mask or Mask()
        packing = Packing(facts.valid)
        x, facts = packing.pack(x), packing.pack_mask(facts)
        old = state if isinstance(state, RTransformerState) else None
        x, recent = self._run_windows(x, facts.valid, old)
        attended, cache = self._attend(self.attention_norm(x), facts, old)
        x = x + self.dropout(attended)
        y = x + self.dropout(self.contract(F.relu(self.expand(self.feedforward_norm(x)))))
        y = packing.unpack(y)
        if cache is None:
            return Mixed(y)
        return Mixed(y, RTransformerState(cache.length, cache.keys, cache.values, cache.segments, recent))

    def _run_windows(self, x: Tensor, valid: Tensor | None, state: RTransformerState | None) -> tuple[Tensor, Tensor]:
        """The stream (B, L, D) behind the local networks, and what the next windows begin with (B, N, M - 1, D)."""
        count = torch.full_like(x[:, 0, 0], x.shape[1], dtype=torch.int64) if valid is None else valid.sum(dim=1)
        last = count[:, None] + torch.arange(self.config.window - 1, device=x.device)
        recent = []
        for index, network in enumerate(self._networks()):
            out, tokens = network(x, None if state is None else state.recent[:, index])
            x = x + self.dropout(out)
            if state is not None:
                recent.append(take(tokens, last).to(state.recent.dtype))
        if state is None or not recent:
            return x, x[:, None, :0] if state is None else state.recent
        return x, torch.stack(recent, dim=1)

    def _attend(self, x: Tensor, facts: Mask, state: RTransformerState | None) -> tuple[Tensor, KeyValueCache | None]:
        """Causal attention of the normed stream x (B, L, D), whose invalid tokens stand last, and the longer cache."""
        q, k, v = (
            split_heads(projection(x), self.dims.num_heads)
            for projection in (self.project_query, self.project_key, self.project_value)
        )
        if state is None:
            out, cache = F.scaled_dot_product_attention(q, k, v, is_causal=True), None
        else:
            cache = KeyValueCache(state.length, state.keys, state.values, state.segments)
            out, cache = attend_cached("r_transformer", Heads(x, q, k, v, facts, facts), Causal(), cache)
        return self.project_out(merge_heads(out.to(x.dtype))), cache

    def _networks(self) -> list[LocalNetwork]:
        return cast("list[LocalNetwork]", list(self.local_networks))
