"""Compressive Transformer: Transformer-XL whose memory, before it is forgotten, is compressed into a second memory.

Rae et al. 2020, "Compressive Transformers for Long-Range Sequence Modelling", arXiv:1911.05507.

    o_i = softmax over the rows of the compressed memory, the memory and the segment so far of s_ij, times v_j
    s_ij as in transformer_xl; of a row with distances, W_r and w of their own
    at the end of a segment: old = what leaves the memory, the newest M tokens staying
                             rows = f_c(old), one for every `rate` tokens; the newest C rows stay
    f_c: largest | mean | convolution | dilated convolutions | the tokens that got most attention
    aux = mean of (A(h, old) - A(h, rows))² or of (old - g(rows))²     h: the segment; A: attention without positions

f_c alone learns from aux, and g, its decoder: h, old and the projections are as they are there; and f_c learns from
nothing else, unless loss="bptt". No gradient reaches a token through a later segment.

Cost O(L² D): a call is a segment, after which the memory moves on. With `segment_length=N` it is O(L (N + M + C) D).
State: the last M inputs, those that wait for a full window and those of an unfinished segment; C rows. With
`segment_length` segments begin at its multiples in the stream, and any partition into calls gives the same result.

Departures: the memories start empty; `zero_memory=True` starts with zeros that are attended, as the paper does. What
leaves is counted behind memory and segment, as in the official code, so that M may be less than N. A run too short for
a window waits; beyond that the tokens behind the last window are dropped, as in the official code, or carried over.
Biases are scaled with the scores, as in Transformer-XL, where the official code scales q alone; so without rows this
is transformer_xl. Distances of rows are the official code's: as if the rows stood right before the segment;
`cm_positions="true"` has those of the first token of every window, if none was dropped, and no parameters of its own.
The paper doesn't say over which queries usage is averaged: the heads and the last segment. Without a state, what
leaves at the end of a call isn't compressed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.layers.compression import Decoder, Kind, compression, convolution_cost
from subquad.layers.compressive_cost import attention_loss_cost, decoding_loss_cost, memories_cost
from subquad.layers.compressive_stream import CompressiveState, Sizes, Stream, begin, next_state, note_untaught
from subquad.layers.heads import Attended, Heads, projection_cost
from subquad.layers.memory_mixer import DEVIATION, MemoryMixer, Packed
from subquad.ops.memory.attention import Distances, VisibleColumns
from subquad.ops.memory.compressed import CompressedRows, VisibleRows, compressed_attention
from subquad.ops.memory.evictions import Eviction, tally
from subquad.ops.memory.most_used import Scored, most_used
from subquad.ops.memory.reconstruction import attention_parts, decoding_parts, mean_of
from subquad.ops.memory.stream_layout import Layout
from subquad.ops.projection import project
from subquad.registry import register
from subquad.state import State


@register("compressive")
@dataclass(frozen=True, kw_only=True)
class CompressiveConfig(MixerConfig):
    """Options of the Compressive Transformer."""

    family: ClassVar[str] = "recurrent"
    why_not_rotary: ClassVar[str] = "it has relative ones"

    compression: Kind = "convolution"
    """f_c, of windows of tokens; "most_used" keeps tokens."""
    rate: int = 4
    """Tokens for one row."""
    overlap: int = 0
    """Tokens that a window shares with the next one; not for "most_used"."""
    dilations: tuple[int, ...] = (1, 2, 4)
    """Of the convolutions before the last one, with compression="dilated"; a window grows by their sum."""
    remainder: Literal["drop", "carry"] = "drop"
    """What becomes of tokens behind the last full window of a segment."""
    loss: Literal["attention", "autoencoding", "bptt"] | None = None
    """What trains f_c; "bptt": the model's loss, through later segments of a call, which takes `segment_length`; None:
    "attention" where f_c has parameters, else nothing."""
    loss_weight: float = 1.0
    """Factor of the auxiliary loss."""
    cm_positions: Literal["official", "true"] = "official"
    """Distances of rows: as if right before the segment, with a W_r and w of their own; or those of their tokens."""
    memory_length: int = 512
    """M, tokens before the segment that are attended."""
    compressed_length: int = 512
    """C, rows that are attended."""
    eval_memory_length: int | None = None
    """M in evaluation; None for the same as in training."""
    eval_compressed_length: int | None = None
    """C in evaluation; None for the same as in training."""
    segment_length: int | None = None
    """N, tokens per segment, counted from the start of the stream; None: every call is a segment."""
    zero_memory: bool = False
    """The stream begins with M zeros and C rows of zeros that are attended, instead of nothing; without
    `segment_length` it then matters how a stream is cut into calls."""
    share_biases: bool = True
    """u and both w are the same in all layers."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        self.check_least({"rate": 1, "overlap": 0, "segment_length": 1, "loss_weight": 0})
        self.check_least({"memory_length": 0, "eval_memory_length": 0})
        self.check_least({"compressed_length": 0, "eval_compressed_length": 0})
        if any(dilation < 1 for dilation in self.dilations):
            raise ValueError(f"compressive: dilations must be at least 1, got {list(self.dilations)}")
        if self.compression == "most_used" and self.overlap:
            raise ValueError(f"compressive: most_used has no windows, so overlap must be 0, got {self.overlap}")
        if self.loss == "bptt" and self.segment_length is None:
            raise ValueError("compressive: loss='bptt' needs segment_length, at most half of a training sequence")
        if self.loss is not None and not self.learns:
            raise ValueError(
                f"compressive: compression={self.compression!r} has no parameters that loss={self.loss!r} could train; "
                "use loss=None, or compression='convolution' or 'dilated'"
            )

    @property
    def learns(self) -> bool:
        """Whether f_c has parameters."""
        return self.compression in ("convolution", "dilated")

    @property
    def trained_by(self) -> str:
        """The loss of f_c; empty for none."""
        return self.loss or ("attention" if self.learns else "")

    @property
    def kernel(self) -> int:
        """Tokens that the last convolution, or pooling, reads."""
        return self.rate + self.overlap

    @property
    def used_dilations(self) -> tuple[int, ...]:
        """Of the convolutions that there are."""
        return self.dilations if self.compression == "dilated" else ()

    @property
    def traits(self) -> Traits:
        """Causal alone: the memory is of the past. It is that of one stream, hence no segments.

        A call that is one segment is softmax attention with positions, which are near 0 at first.
        """
        return Traits(
            causal=True,
            padding=True,
            state=True,
            constant_state=True,
            approximates_softmax=self.segment_length is None and not self.zero_memory,
            aux_loss=self.trained_by in ("attention", "autoencoding"),
        )

    def eviction(self, *, training: bool) -> Eviction:
        """When what leaves the memory."""
        longer = None if training else self.eval_memory_length
        memory = self.memory_length if longer is None else longer
        window = self.kernel + sum(self.used_dilations)
        return Eviction(memory, self.segment_length, self.rate, window, self.remainder == "carry")

    def rows(self, *, training: bool) -> int:
        """C in training or in evaluation."""
        longer = None if training else self.eval_compressed_length
        return self.compressed_length if longer is None else longer

    def sizes(self, *, training: bool) -> Sizes:
        """What a state holds."""
        eviction, most = self.eviction(training=training), self.rows(training=training)
        memory = max(self.memory_length, self.eval_memory_length or 0)
        hidden = eviction.window - 1 + memory + (self.segment_length or 1) - 1
        compressed = max(self.compressed_length, self.eval_compressed_length or 0)
        zeros = (eviction.memory_length, most) if self.zero_memory else (0, 0)
        return Sizes(hidden, compressed, hidden if self.compression == "most_used" else 0, *zeros)

    def build(self, dims: Dims) -> Compressive:
        """The module."""
        return Compressive(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """In training: as transformer_xl for the tokens; then the rows, what makes them, and the auxiliary loss."""
        sizes, official = self.sizes(training=True), self.cm_positions == "official"
        segments = self.eviction(training=True).segments(sizes.stand, length, last=False)
        seen = tally(segments, self.compressed_length, None if official else self.rate)
        zeros, chosen = (sizes.zero_tokens, sizes.zero_rows), self.compression == "most_used"
        held = (sizes.hidden + sizes.compressed) * dims.embed_dim + sizes.usage
        total = projection_cost(dims, length, dtype_bytes) + Cost(state_bytes=held * max(4, dtype_bytes))
        total += memories_cost(dims, length, dtype_bytes, seen, zeros=zeros, own_positions=official, chosen=chosen)
        if self.learns:
            total += convolution_cost(dims.embed_dim, self.kernel, self.used_dilations, seen.rows, dtype_bytes)
        if self.trained_by == "attention":
            total += attention_loss_cost(dims, seen, dtype_bytes)
        if self.trained_by == "autoencoding":
            total += decoding_loss_cost(dims, seen, self.rate, dtype_bytes)
        return total


class Compressive(MemoryMixer):
    """Attention to a segment and two memories."""

    config: CompressiveConfig

    def __init__(self, config: CompressiveConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.project_row_distance, self.row_position_bias = None, None
        if config.cm_positions == "official":
            self.project_row_distance = nn.Parameter(torch.empty(dims.inner_dim, dims.embed_dim))
            self.row_position_bias = nn.Parameter(torch.empty(dims.num_heads, dims.head_dim))
        self.compress = compression(config.compression, dims.embed_dim, config.kernel, config.used_dilations)
        self.decode = Decoder(dims.embed_dim, config.rate) if config.trained_by == "autoencoding" else None
        self.initialise()

    def initialise(self) -> None:
        """Draw u, both w and both W_r."""
        super().initialise()
        for parameter in (self.project_row_distance, self.row_position_bias):
            if parameter is not None:
                nn.init.normal_(parameter, std=DEVIATION)

    def shared_parameters(self) -> tuple[str, ...]:
        """The u and w of all layers."""
        if not self.config.share_biases:
            return ()
        of_rows = () if self.row_position_bias is None else ("row_position_bias",)
        return ("content_bias", "position_bias", *of_rows)

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> CompressiveState:
        """Nothing seen yet."""
        return self.config.sizes(training=self.training).fresh(batch_size, self.dims.embed_dim, device, dtype)

    def attend(self, heads: Heads, state: State | None) -> Attended:
        """Attend to the call and to what is stored, and compress what leaves the memory."""
        config, call, before = self.config, self.pack(heads), state if isinstance(state, CompressiveState) else None
        x, eviction = call.x, config.eviction(training=self.training)
        stream = begin(x, heads.mask.valid, config.sizes(training=self.training), eviction, before)
        layout = stream.layout
        k, v, memory = self.join(stream.hidden, call, apart=config.segment_length is not None)
        reach = layout.reach(x.device)
        true_step = None if config.cm_positions == "official" else config.rate
        sight = layout.sight(x.device, config.rows(training=self.training), true_step)
        distances, of_rows = self._distances(layout, reach, sight, x)
        columns, usage = layout.windows(config.rate, eviction.window, x.device), stream.usage
        if config.compression == "most_used" and (layout.made or before is not None):
            row_k = self.split(self.project_key(stream.rows))
            columns, usage = most_used(Scored(call.q, k, row_k, distances, of_rows, sight), layout, usage)
        windows = stream.windows(x, columns)
        made = self.compress(windows)
        if config.trained_by == "bptt" and self.training:
            note_untaught(stream, sight)
        kept = made if config.trained_by == "bptt" else made.detach()
        rows = None if of_rows is None else self._rows(torch.cat((stream.rows, kept), dim=1), of_rows, sight)
        out = compressed_attention(call.q, k, v, distances, reach, memory, rows)
        loss = self._loss(stream, call, (k, v), windows, made) if self.training and config.traits.aux_loss else None
        after = None if before is None else next_state(before, x, kept, usage, layout, config.segment_length)
        return Attended(call.packing.unpack(out), after, loss)

    def _distances(
        self, layout: Layout, reach: VisibleColumns, sight: VisibleRows, x: Tensor
    ) -> tuple[Distances, Distances | None]:
        """Distances of tokens, and of rows where any is seen."""
        columns = layout.stored + torch.arange(layout.length, device=x.device)
        farthest = int((columns - reach.first).max())
        of_rows = torch.where(sight.stop > sight.first, sight.ahead + sight.step * (sight.stop - sight.first), -1)
        farthest_row = int(of_rows.max())
        count = 1 + (max(farthest, farthest_row) if self.row_position_bias is None else farthest)
        vectors = self.encode(count, self.project_distance, x)
        distances = Distances(vectors, self.content_bias, self.position_bias)
        if farthest_row < 0:
            return distances, None
        if self.row_position_bias is None or self.project_row_distance is None:
            return distances, distances
        vectors = self.encode(farthest_row + 1, self.project_row_distance, x)
        return distances, Distances(vectors, self.content_bias, self.row_position_bias)

    def _rows(self, rows: Tensor, distances: Distances, sight: VisibleRows) -> CompressedRows:
        """Keys and values of rows (B, R, D)."""
        k, v = self.split(self.project_key(rows)), self.split(self.project_value(rows))
        return CompressedRows(k, v, distances, sight)

    def _loss(
        self, stream: Stream, call: Packed, tokens: tuple[Tensor, Tensor], windows: Tensor, made: Tensor
    ) -> Tensor:
        """How well rows stand for tokens."""
        if self.decode is not None:
            parts = decoding_parts(stream.layout, windows[:, :, : self.config.rate], made, self.decode)
        else:
            q, unfinished = call.q, stream.layout.unfinished
            if unfinished:
                older = self.project_query(stream.hidden[:, stream.layout.stored - unfinished :])
                q = torch.cat((self.split(older), q), dim=2)
            parts = attention_parts(stream.layout, q, *tokens, made, self._project_alone)
        return (self.config.loss_weight * mean_of(parts, made)).float()

    def _project_alone(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of rows (N, R, D), of which the projections learn nothing."""
        layers = (self.project_key, self.project_value)
        weights = ((layer.weight.detach(), None if layer.bias is None else layer.bias.detach()) for layer in layers)
        k, v = (self.split(project(rows, weight, bias)) for weight, bias in weights)
        return k, v
