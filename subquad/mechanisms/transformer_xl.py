"""Transformer-XL: causal attention to a segment and to a memory of the tokens before it, with relative positions.

Dai et al. 2019, "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", arXiv:1901.02860.

    q_i = x_i W_q,  k_j = x_j W_k,  v_j = x_j W_v,  r_δ = R_δ W_r        R_δ = (sin δω_0, sin δω_1, ..., cos δω_0, ...)
    s_ij = ((q_i + u) · k_j + (q_i + w) · r_(i-j)) / √E                  ω_n = 10000^(-2n / D)
    o_i = softmax over the j <= i of i's segment and the M tokens before that segment of s_ij, times v_j
    same_length: over 0 <= i - j < M instead

No gradient reaches a token through a later segment. u and w, a vector for each head, are the same in all layers.

Cost O(L² D): a call is a segment. With `segment_length=N` it is O(L (N + M) D). State: the last M inputs, of which keys
and values are computed again; with `segment_length=N` those of an unfinished segment too. With it segments begin at the
multiples of N in the stream, and any partition into calls gives the same result; gradients flow from call to call
inside a segment. With `cache_keys=True` the state of evaluation holds keys and values instead.

Departures: the scale, which the paper's text leaves out, is that of its code. The memory starts empty, as in the
PyTorch code; `zero_memory=True` starts with M attended zeros, as in the TensorFlow code. `same_length` counts keys as
the PyTorch code does, with the token itself. The memory holds what the mixer gets, in a pre-norm model the normalised
stream; the code norms again. Dropout acts on the output alone, not on R. There are biases if the model asks for them.
An invalid token takes no position and enters no memory. Packed documents are refused: a memory is that of one stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from subquad.costs import Cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.layers.heads import Heads, projection_cost
from subquad.layers.memory_mixer import MemoryMixer, Packed, recent_inputs, recent_rows
from subquad.layers.segment_sight import SegmentRule, segment_pairs
from subquad.ops.memory.attention import Distances, Memory, VisibleColumns, memory_attention
from subquad.registry import register
from subquad.state import State, state_dataclass


@register("transformer_xl")
@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig(MixerConfig):
    """Options of Transformer-XL."""

    family: ClassVar[str] = "recurrent"
    why_not_rotary: ClassVar[str] = "it has relative ones"

    memory_length: int = 512
    """M, tokens before the segment that are attended."""
    eval_memory_length: int | None = None
    """M in evaluation; None for the same as in training."""
    segment_length: int | None = None
    """N, tokens per segment, counted from the start of the stream; None: every call is a segment."""
    same_length: bool = False
    """Every token sees M keys, itself included, instead of M and those of its segment so far."""
    eval_same_length: bool | None = None
    """The same in evaluation; None for the same as in training."""
    clamp_length: int | None = None
    """Largest distance with an encoding of its own; larger ones share it. None for no limit."""
    eval_clamp_length: int | None = None
    """The same in evaluation; None for the same as in training."""
    cache_keys: bool = False
    """A state made in evaluation holds keys and values, so that they aren't computed again; no gradient flows from call
    to call, the weights must stay, and it isn't a state for training, nor the other way round."""
    zero_memory: bool = False
    """The stream begins with a memory of zeros that are attended, instead of an empty one; without
    `segment_length` it then matters how a stream is cut into calls."""
    share_biases: bool = True
    """u and w are the same in all layers."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        self.check_least({"memory_length": 1 if self.same_length else 0, "eval_memory_length": 0})
        self.check_least({"segment_length": 1, "clamp_length": 0, "eval_clamp_length": 0})
        evaluation = self.rule(training=False)
        if evaluation.same_length and evaluation.memory_length < 1:
            raise ValueError(
                "transformer_xl: same_length needs a memory_length of at least 1, in evaluation too, got 0"
            )

    def rule(self, *, training: bool) -> SegmentRule:
        """What is seen in training or in evaluation."""
        if training:
            return SegmentRule(self.memory_length, self.same_length, self.clamp_length)
        memory, same_length, clamp = self.eval_memory_length, self.eval_same_length, self.eval_clamp_length
        return SegmentRule(
            self.memory_length if memory is None else memory,
            self.same_length if same_length is None else same_length,
            self.clamp_length if clamp is None else clamp,
        )

    @property
    def traits(self) -> Traits:
        """Causal alone: the memory is of the past. It is that of one stream, hence no segments.

        A call that is one segment is softmax attention with positions, which are near 0 at first.
        """
        same_length = self.same_length or self.rule(training=False).same_length
        dense = self.segment_length is None and not (same_length or self.zero_memory)
        return Traits(causal=True, padding=True, state=True, constant_state=True, approximates_softmax=dense)

    @property
    def stored(self) -> int:
        """Tokens that the state holds: the longer memory, and an unfinished segment."""
        return max(self.memory_length, self.eval_memory_length or 0) + (self.segment_length or 1) - 1

    def build(self, dims: Dims) -> TransformerXL:
        """The module."""
        return TransformerXL(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections, those of the distances, and three products for each visible pair, in training.

        Autograd keeps the encodings of the distances and their projections, and the log-sum-exp of every row; of
        attended zeros the zeros, their keys and their values. A state of cached keys is that of evaluation.
        """
        inner, weights = dims.inner_dim, dims.embed_dim * dims.inner_dim
        trained = self.rule(training=True)
        pairs, farthest = segment_pairs(length, self.segment_length, trained, zero_memory=self.zero_memory)
        distances = farthest if self.clamp_length is None else min(farthest, self.clamp_length + 1)
        zeros = self.memory_length if self.zero_memory and length else 0
        own = Cost(
            flops=2 * (distances + 2 * zeros) * weights + 3 * 2 * pairs * inner,
            activation_bytes=dtype_bytes * (distances + zeros) * (dims.embed_dim + inner)
            + dtype_bytes * zeros * inner
            + max(4, dtype_bytes) * dims.num_heads * length,
            state_bytes=self.stored * (2 * inner if self.cache_keys else dims.embed_dim) * max(4, dtype_bytes),
            parameters=weights + 2 * inner,
        )
        return projection_cost(dims, length, dtype_bytes) + own


@state_dataclass
class RecentTokens(State):
    """The last T valid tokens of a stream, the newest in the last column.

    Attributes:
        length: int64 (B,).
        hidden: (B, T, D), their inputs, zeros before the first; (B, 0, D) where keys are cached.
        keys: (B, H, T, E), with those of zeros before the first; (B, H, 0, E) where keys aren't cached.
        values: likewise.
    """

    hidden: Tensor
    keys: Tensor
    values: Tensor


class TransformerXL(MemoryMixer):
    """Attention to a segment and a memory."""

    config: TransformerXLConfig

    def __init__(self, config: TransformerXLConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.initialise()

    def shared_parameters(self) -> tuple[str, ...]:
        """The u and w of all layers."""
        return ("content_bias", "position_bias") if self.config.share_biases else ()

    @property
    def rule(self) -> SegmentRule:
        """What is seen as it is now, in training or evaluation."""
        return self.config.rule(training=self.training)

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> RecentTokens:
        """Nothing seen yet."""
        stored, cached = self.config.stored, self.config.cache_keys and not self.training
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        hidden = torch.zeros(batch_size, 0 if cached else stored, self.dims.embed_dim, device=device, dtype=dtype)
        keys = torch.zeros(batch_size, self.dims.inner_dim, stored if cached else 0, device=device, dtype=dtype)
        pairs = []
        for layer in (self.project_key, self.project_value):
            of_zeros = keys if layer.bias is None else keys + layer.bias.detach().to(keys)[:, None]
            pairs.append(of_zeros.unflatten(1, (self.dims.num_heads, -1)).transpose(2, 3).contiguous())
        return RecentTokens(length, hidden, *pairs)

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Attend to the call and to what is stored."""
        call, valid = self.pack(heads), heads.mask.valid
        before = state if isinstance(state, RecentTokens) else None
        stored = self._stored(before)
        k, v, memory = self._joined(before, stored, call)
        reach = self._reach(call.x, stored, None if before is None else before.length)
        distances = self._distances(reach, stored, call.x)
        out = memory_attention(call.q, k, v, distances, reach, memory)
        after = None
        if before is not None:
            after = self._next_state(before, call, (k, v), valid)
        return call.packing.unpack(out), after

    def _stored(self, before: RecentTokens | None) -> int:
        """Stored tokens before those of a call, at least those that any of it sees."""
        memory = self.rule.memory_length
        if before is None:
            return memory if self.config.zero_memory else 0
        if before.keys.shape[2]:  # all, as they are joined with those of the call but once
            return before.keys.shape[2]
        needed = memory + (self.config.segment_length or 1) - 1
        return needed if self.config.zero_memory else min(needed, max([0, *before.length.tolist()]))

    def _joined(self, before: RecentTokens | None, stored: int, call: Packed) -> tuple[Tensor, Tensor, Memory | None]:
        """Keys and values of what is stored and of the call."""
        x, apart = call.x, self.config.segment_length is not None
        if before is None:
            return self.join(x.new_zeros(x.shape[0], stored, x.shape[2]), call, apart=apart)
        if not before.keys.shape[2]:
            return self.join(before.hidden[:, before.hidden.shape[1] - stored :].to(x.dtype), call, apart=apart)
        new_k, new_v, memory = self.join(x[:, :0], call, apart=apart)
        cached = before.keys.to(new_k.dtype), before.values.to(new_v.dtype)
        k, v = (torch.cat(pair, dim=2) for pair in zip(cached, (new_k, new_v), strict=True))
        if memory is not None:
            memory = Memory(*(torch.cat(pair, dim=2) for pair in zip(cached, memory, strict=True)))
        return k, v, memory

    def _next_state(
        self, before: RecentTokens, call: Packed, joined: tuple[Tensor, Tensor], valid: Tensor | None
    ) -> RecentTokens:
        """The state after a call, of which some tokens are valid, bool (B, L), or all."""
        size, stored = call.x.shape[1], before.keys.shape[2]
        added = torch.full_like(before.length, size) if valid is None else valid.sum(dim=1)
        length = before.length + added
        if stored:
            rows = (heads.detach().to(before.keys.dtype) for heads in joined)
            if valid is None and size <= stored:  # a view of not much more
                return RecentTokens(length, before.hidden, *(heads[:, :, size:] for heads in rows))
            return RecentTokens(length, before.hidden, *(recent_rows(heads, stored, added) for heads in rows))
        unfinished = None if self.config.segment_length is None else length % self.config.segment_length
        hidden = recent_inputs(before.hidden, call.x, added, unfinished)
        return RecentTokens(length, hidden, before.keys, before.values)

    def _reach(self, x: Tensor, stored: int, length: Tensor | None) -> VisibleColumns:
        """Columns of the stored tokens and the call in which a token's segment and what it sees begin.

        Args:
            x: tokens of the call (B, L, D).
            stored: tokens before them.
            length: tokens that the streams held before, int64 (B,); None for none.
        """
        memory, same_length, _ = self.rule
        columns = stored + torch.arange(x.shape[1], device=x.device)[None]
        start = torch.zeros(1, dtype=torch.int64, device=x.device) if length is None or not len(length) else length
        first_ever, size = stored - start[:, None], self.config.segment_length
        if size is None:
            own = torch.full_like(columns, stored).expand(len(first_ever), -1)
        else:
            own = columns - (columns - first_ever) % size
        first = own - memory
        if same_length:
            first = torch.maximum(first, columns - memory + 1)
        if not self.config.zero_memory:
            first = torch.maximum(first, first_ever)
        return VisibleColumns(first.clamp_min(0), own.clamp_min(0))

    def _distances(self, reach: VisibleColumns, stored: int, x: Tensor) -> Distances:
        """The projected encodings of the distances that occur, and u and w."""
        columns = stored + torch.arange(x.shape[1], device=x.device)
        farthest, clamp = int((columns - reach.first).max()), self.rule.clamp_length
        count = 1 + (farthest if clamp is None else min(farthest, clamp))
        vectors = self.encode(count, self.project_distance, x)
        return Distances(vectors, self.content_bias, self.position_bias)
