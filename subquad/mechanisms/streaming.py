"""Streaming: a sliding window and the first few tokens, the attention sinks, in a cache of constant size.

Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453.

    o_i = softmax over {0 <= i - j < W} ∪ {j < S, j <= i} of q_i · k_j / √E

Cost O(L (W + S) D); state: the first S and the last W - 1 keys, before rotation, and values. With rotary positions a
key stands at its place in the cache: inside the window i - j behind the query, a sink outside of the window
min(i, S + W - 1) - j behind it. So no distance ever exceeds S + W - 1, however long the stream.

    learned sink, a number σ for each head that stands for one more key without a value:
    o_i = Σ_j exp(s_ij) v_j / (Σ_j exp(s_ij) + exp(σ))

Departures: W counts the keys, itself included (the paper's cache of r recent tokens is W = r + 1; it evaluates S = 4
with r = 252 to 2044). The paper changes a trained model's cache; here the same rule holds over a whole sequence too, in
training, where the paper's step-by-step rule is slow. The learned sink is OpenAI's gpt-oss's; the paper's own trains a
token. Positions count valid tokens. Packed documents are refused: the sinks are those of one stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from subquad.costs import Cost, visible_pairs
from subquad.interface import Dims, MixerConfig, Traits
from subquad.layers.heads import BY_HEADS, HeadMixer, Heads, attention_cost, projection_cost
from subquad.mask import Mask
from subquad.ops.packing import Packing, append, take
from subquad.ops.pattern.attention import pattern_attention_with_lse
from subquad.ops.rotary import rotate
from subquad.patterns.bands import Causal, Window
from subquad.patterns.tokens import Sink
from subquad.registry import register
from subquad.state import State, state_dataclass


@register("streaming")
@dataclass(frozen=True, kw_only=True)
class StreamingConfig(MixerConfig):
    """Options of attention with sinks and a window."""

    family: ClassVar[str] = "sparse"

    sinks: int = 4
    """S, tokens at the start of the stream that every later token sees."""
    window: int = 129
    """W, keys that a token sees besides, itself included."""
    learned_sink: bool = False
    """A learned number for each head joins every softmax, so that a token may attend to nothing."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.sinks < 0:
            raise ValueError(f"streaming: sinks counts the first tokens of a stream, 0 for none; got {self.sinks}")
        if self.window < 1:
            raise ValueError(f"streaming: window counts the keys a token sees, itself included; got {self.window}")

    @property
    def traits(self) -> Traits:
        """Causal alone: a stream has a start and no end. It is one stream, hence no segments."""
        return Traits(causal=True, padding=True, state=True, constant_state=True)

    def build(self, dims: Dims) -> Streaming:
        """The module."""
        return Streaming(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections, the pairs inside the window, those of the sinks outside of it, and merging the two softmaxes."""
        outside = max(0, length - self.window)  # tokens for which the first sink has left the window
        sinks = min(self.sinks, outside)
        pairs = visible_pairs(length, left=self.window - 1, right=0) + sinks * outside - sinks * (sinks - 1) // 2
        stored = self.sinks + self.window - 1
        own = Cost(
            activation_bytes=self._merging_bytes(dims, length, dtype_bytes),
            state_bytes=2 * stored * dims.inner_dim * max(4, dtype_bytes),
            parameters=dims.num_heads if self.learned_sink else 0,
        )
        return projection_cost(dims, length, dtype_bytes) + attention_cost(dims, length, pairs, dtype_bytes) + own

    def _merging_bytes(self, dims: Dims, length: int, dtype_bytes: int) -> int:
        """What autograd keeps to merge softmaxes: their results and weights; for the sinks q, k and log-sum-exp too."""
        apart = dims.positions == "rotary" and self.sinks > 0
        if not (apart or self.learned_sink):
            return 0
        parts = 1 + apart
        tokens = parts * length + (length + min(self.sinks, length) if apart else 0)
        numbers = (parts + self.learned_sink + apart) * length * dims.num_heads
        return dtype_bytes * tokens * dims.inner_dim + max(4, dtype_bytes) * numbers


@state_dataclass
class StreamingState(State):
    """The first S and the last W - 1 valid tokens, keys before rotation; what the stream has not reached is zeros.

    Attributes:
        length: int64 (B,).
        sink_keys: (B, H, S, E), in order.
        sink_values: (B, H, S, E).
        keys: (B, H, W - 1, E), the newest in the last column; sinks are in here too while they are among the last.
        values: (B, H, W - 1, E).
    """

    sink_keys: Tensor
    sink_values: Tensor
    keys: Tensor
    values: Tensor


class Part(NamedTuple):
    """One softmax over some of the keys.

    Attributes:
        out: (B, H, L, E).
        lse: (B, H, L), log-sum-exp of its scores.
    """

    out: Tensor
    lse: Tensor


class Streaming(HeadMixer):
    """Attention to a window and to the start of the stream."""

    parting = BY_HEADS
    config: StreamingConfig

    def __init__(self, config: StreamingConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.sink_score = nn.Parameter(torch.zeros(dims.num_heads)) if config.learned_sink else None

    def initialise(self) -> None:
        """A score of 0 for the learned sink."""
        if self.sink_score is not None:
            nn.init.zeros_(self.sink_score)

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> StreamingState:
        """Nothing seen yet."""
        shape = (batch_size, self.dims.num_heads, self.config.sinks, self.dims.head_dim)
        sinks = torch.zeros(shape, device=device, dtype=dtype)
        recent = torch.zeros(*shape[:2], self.config.window - 1, shape[3], device=device, dtype=dtype)
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return StreamingState(length, sinks, sinks.clone(), recent, recent.clone())

    def rotate_heads(
        self, q: Tensor, k: Tensor | None, mask: Mask | None, key_mask: Mask | None, state: State | None
    ) -> tuple[Tensor, Tensor | None]:
        """Nothing yet: the cache holds keys before rotation."""
        return q, k

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Attend to window and sinks; padding is taken out first, so that it takes no position."""
        packing = Packing(heads.mask.valid)
        q, k, v = (packing.pack(tensor) for tensor in (heads.q, *heads.keys_and_values()))
        valid = packing.valid
        positions, after = torch.arange(q.shape[2], device=q.device)[None], None
        if isinstance(state, StreamingState):
            parts, after = self._continue(q, k, v, valid, positions + state.length[:, None], state)
        elif self.dims.positions == "rotary":
            sink_keys, sink_values = (tensor[:, :, : self.config.sinks] for tensor in (k, v))
            parts = [self._in_window(q, k, v, valid), *self._outside(q, sink_keys, sink_values, positions, 0)]
        else:
            pattern = Causal() & (Window(self.config.window - 1, 0) | Sink(self.config.sinks))
            parts = [Part(*pattern_attention_with_lse(q, k, v, pattern, key_valid=valid))]
        out = self._merge(parts)
        return packing.unpack(out), after

    def _continue(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, positions: Tensor, before: StreamingState
    ) -> tuple[list[Part], StreamingState]:
        """Attend to what is stored too, and store the new tokens."""
        valid = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
        k, v = (torch.cat((old.to(q.dtype), new), dim=2) for old, new in ((before.keys, k), (before.values, v)))
        after = _next_state(before, k, v, positions, valid)
        stored = before.keys.shape[2]
        known = torch.arange(stored, device=q.device) >= stored - before.length[:, None]
        in_window = self._in_window(q, k, v, torch.cat((known, valid), dim=1))
        sink_keys, sink_values = (tensor.to(q.dtype) for tensor in (after.sink_keys, after.sink_values))
        return [in_window, *self._outside(q, sink_keys, sink_values, positions, before.length)], after

    def _in_window(self, q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None) -> Part:
        """The keys inside the window; those beyond as many as there are queries precede them."""
        stored = k.shape[2] - q.shape[2]
        if self.dims.positions == "rotary":
            columns = torch.arange(k.shape[2], device=q.device)[None]
            q, k = rotate(q, columns[:, stored:]), rotate(k, columns)
        window = Window(self.config.window - 1, 0)
        return Part(*pattern_attention_with_lse(q, k, v, window, key_valid=key_valid, query_offset=stored))

    def _outside(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, start: int | Tensor) -> list[Part]:
        """The sinks (k, v) that have left a query's window: one part, or none without sinks.

        A sink outside of the window of a valid query has been seen, so that nothing is left to be masked.
        """
        if not self.config.sinks:
            return []
        window = self.config.window
        if self.dims.positions == "rotary":
            q = rotate(q, positions.clamp_max(self.config.sinks + window - 1))
            k = rotate(k, torch.arange(k.shape[2], device=q.device)[None])
        pattern = Causal() & ~Window(window - 1, 0)
        return [Part(*pattern_attention_with_lse(q, k, v, pattern, query_offset=start))]

    def _merge(self, parts: list[Part]) -> Tensor:
        """The softmax over the keys of all parts, which have none in common, and the learned sink: (B, H, L, E)."""
        if len(parts) == 1 and self.sink_score is None:
            return parts[0].out
        own = parts[0].lse  # of a query that sees something it is finite, and what the others give doesn't matter
        scores = [own.masked_fill(own.isneginf(), 0.0), *(part.lse for part in parts[1:])]
        if self.sink_score is not None:
            scores.append(self.sink_score.to(own.dtype)[:, None].expand_as(own))
        weights = torch.stack(scores, dim=-1).softmax(dim=-1)[..., None, :]
        weighted = [part.out * weights[..., index] for index, part in enumerate(parts)]
        return weighted[0] if len(parts) == 1 else weighted[0] + weighted[1]


def _next_state(before: StreamingState, k: Tensor, v: Tensor, positions: Tensor, valid: Tensor) -> StreamingState:
    """The state after a call; k and v begin with the stored columns, and the valid new tokens are the first behind."""
    (sinks, stored), added = (before.sink_keys.shape[2], before.keys.shape[2]), valid.sum(dim=1)
    places = positions.masked_fill(~valid, sinks)[:, :sinks]
    newest = torch.arange(stored, device=k.device) + added[:, None]
    first, last = [], []
    for old, tokens in ((before.sink_keys, k), (before.sink_values, v)):
        tokens = tokens.to(old.dtype)
        first.append(append(old, tokens[:, :, stored : stored + sinks], places, sinks))
        last.append(take(tokens, newest))
    return StreamingState(before.length + added, *first, *last)
