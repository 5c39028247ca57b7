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
inside a segment.

Departures: the scale, which the paper's text leaves out, is that of its code. The memory starts empty, as in the
PyTorch code; `zero_memory=True` starts with M attended zeros, as in the TensorFlow code. `same_length` counts keys as
the PyTorch code does, with the token itself. The memory holds what the mixer gets, in a pre-norm model the normalised
stream; the code norms again. Dropout acts on the output alone, not on R. There are biases if the model asks for them.
An invalid token takes no position and enters no memory. Packed documents are refused: a memory is that of one stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from subquad.costs import Cost
from subquad.heads import Heads, projection_cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.memory_mixer import MemoryMixer, recent_inputs
from subquad.ops.memory.attention import Distances, Reach, memory_attention
from subquad.ops.packing import put_back
from subquad.registry import register
from subquad.state import State, state_dataclass


@register("transformer_xl")
@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig(MixerConfig):
    """Options of Transformer-XL."""

    family: ClassVar[str] = "recurrent"

    memory_length: int = 512
    """M, tokens before the segment that are attended."""
    eval_memory_length: int | None = None
    """M in evaluation; None for the same as in training."""
    segment_length: int | None = None
    """N, tokens per segment, counted from the start of the stream; None: every call is a segment."""
    same_length: bool = False
    """Every token sees M keys, itself included, instead of M and those of its segment so far."""
    clamp_length: int | None = None
    """Largest distance with an encoding of its own; larger ones share it. None for no limit."""
    zero_memory: bool = False
    """The stream begins with a memory of zeros that are attended, instead of an empty one; without
    `segment_length` it then matters how a stream is cut into calls."""
    share_biases: bool = True
    """u and w are the same in all layers."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        least = 1 if self.same_length else 0
        for name, smallest in (
            ("memory_length", least),
            ("eval_memory_length", least),
            ("segment_length", 1),
            ("clamp_length", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"transformer_xl: {name} must be at least {smallest}, got {value}")

    @property
    def traits(self) -> Traits:
        """Causal alone: the memory is of the past. It is that of one stream, hence no segments.

        A call that is one segment is softmax attention with positions, which are near 0 at first.
        """
        dense = self.segment_length is None and not (self.same_length or self.zero_memory)
        return Traits(causal=True, padding=True, state=True, constant_state=True, approximates_softmax=dense)

    @property
    def stored(self) -> int:
        """Inputs that the state holds: the longer memory, and an unfinished segment."""
        return max(self.memory_length, self.eval_memory_length or 0) + (self.segment_length or 1) - 1

    def check(self, dims: Dims) -> None:
        """Raise ValueError for rotary positions."""
        if dims.positions == "rotary":
            raise ValueError("transformer_xl: positions='rotary' is not supported, it has relative ones; use 'none'")

    def build(self, dims: Dims) -> TransformerXL:
        """The module."""
        return TransformerXL(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections, those of the distances, and three products for each visible pair, in training.

        Autograd keeps the encodings of the distances and their projections, and the log-sum-exp of every row; of
        attended zeros the zeros, their keys and their values.
        """
        inner, weights = dims.inner_dim, dims.embed_dim * dims.inner_dim
        pairs, farthest = self._pairs(length)
        distances = farthest if self.clamp_length is None else min(farthest, self.clamp_length + 1)
        zeros = self.memory_length if self.zero_memory and length else 0
        own = Cost(
            flops=2 * (distances + 2 * zeros) * weights + 3 * 2 * pairs * inner,
            activation_bytes=dtype_bytes * (distances + zeros) * (dims.embed_dim + inner)
            + dtype_bytes * zeros * inner
            + max(4, dtype_bytes) * dims.num_heads * length,
            state_bytes=self.stored * dims.embed_dim * max(4, dtype_bytes),
            parameters=weights + 2 * inner,
        )
        return projection_cost(dims, length, dtype_bytes) + own

    def _pairs(self, length: int) -> tuple[int, int]:
        """Visible pairs of a stream's first tokens, and the number of distances among them."""
        pairs, farthest = 0, 0
        for start, size in self._segments(length):
            before = self.memory_length if self.zero_memory else min(self.memory_length, start)
            if self.same_length:
                reach = self.memory_length
                growing = min(size, max(0, reach - before))  # tokens that see less than the full number of keys
                pairs += growing * before + growing * (growing + 1) // 2 + (size - growing) * reach
                farthest = max(farthest, min(reach, before + size))
            else:
                pairs += size * before + size * (size + 1) // 2
                farthest = max(farthest, before + size)
        return pairs, farthest

    def _segments(self, length: int) -> Iterator[tuple[int, int]]:
        """Start and size of each segment."""
        step = self.segment_length or max(1, length)
        for start in range(0, length, step):
            yield start, min(step, length - start)


@state_dataclass
class RecentInputs(State):
    """The last inputs of a stream.

    Attributes:
        length: int64 (B,).
        hidden: (B, T, D), inputs of the last T valid tokens, the newest in the last column; zeros before the first.
    """

    hidden: Tensor


class Stream(NamedTuple):
    """The valid tokens of a call, behind those that are stored.

    Attributes:
        x: (B, L, D).
        hidden: (B, T, D), stored inputs.
        start: int64 (B or 1,), position of the first token of the call.
    """

    x: Tensor
    hidden: Tensor
    start: Tensor


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
    def memory_length(self) -> int:
        """M as it is now, in training or evaluation."""
        longer = None if self.training else self.config.eval_memory_length
        return self.config.memory_length if longer is None else longer

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> RecentInputs:
        """Nothing seen yet."""
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        hidden = torch.zeros(batch_size, self.config.stored, self.dims.embed_dim, device=device, dtype=dtype)
        return RecentInputs(length, hidden)

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Attend to the call and to what is stored."""
        call, valid = self.pack(heads), heads.mask.valid
        before = state if isinstance(state, RecentInputs) else None
        stream = self._continue(call.x, before)
        k, v, memory = self.join(stream.hidden, call, apart=self.config.segment_length is not None)
        reach = self._reach(stream)
        distances = self._distances(reach, stream.hidden.shape[1], call.x)
        out = memory_attention(call.q, k, v, distances, reach, memory)
        after = None
        if before is not None:
            added = torch.full_like(before.length, call.x.shape[1]) if valid is None else valid.sum(dim=1)
            length = before.length + added
            unfinished = None if self.config.segment_length is None else length % self.config.segment_length
            after = RecentInputs(length, recent_inputs(before.hidden, call.x, added, unfinished))
        return (out if call.order is None else put_back(out, call.order)), after

    def _continue(self, x: Tensor, before: RecentInputs | None) -> Stream:
        """The stream, of what is stored as much as any token can see."""
        if before is None:
            zeros = self.memory_length if self.config.zero_memory else 0
            start = torch.zeros(1, dtype=torch.int64, device=x.device)
            return Stream(x, x.new_zeros(x.shape[0], zeros, x.shape[2]), start)
        needed = self.memory_length + (self.config.segment_length or 1) - 1
        if not self.config.zero_memory:
            needed = min(needed, int(before.length.max()))
        return Stream(x, before.hidden[:, before.hidden.shape[1] - needed :].to(x.dtype), before.length)

    def _reach(self, stream: Stream) -> Reach:
        """Columns of the stored inputs and the call in which a token's segment and what it sees begin."""
        stored, size = stream.hidden.shape[1], self.config.segment_length
        columns = stored + torch.arange(stream.x.shape[1], device=stream.x.device)[None]
        first_ever = stored - stream.start[:, None]
        if size is None:
            own = torch.full_like(columns, stored).expand(len(first_ever), -1)
        else:
            own = columns - (columns - first_ever) % size
        first = own - self.memory_length
        if self.config.same_length:
            first = torch.maximum(first, columns - self.memory_length + 1)
        if not self.config.zero_memory:
            first = torch.maximum(first, first_ever)
        return Reach(first.clamp_min(0), own.clamp_min(0))

    def _distances(self, reach: Reach, stored: int, x: Tensor) -> Distances:
        """The projected encodings of the distances that occur, and u and w."""
        columns = stored + torch.arange(x.shape[1], device=x.device)
        farthest = int((columns - reach.first).max())
        count = 1 + (farthest if self.config.clamp_length is None else min(farthest, self.config.clamp_length))
        vectors = self.encode(count, self.project_distance, x)
        return Distances(vectors, self.content_bias, self.position_bias)
