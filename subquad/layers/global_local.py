"""Attention between two streams of one sequence: a few global tokens in front, the long rest behind them.

    long i:     one softmax over all global j and the long ones with |i - j| <= radius
    global i:   one softmax over every j

The two have softmaxes, and up to a choice of `sharing` projections, of their own: with "none" the keys and values of
each of the four pieces (which rows, which keys) come from another projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from subquad.costs import Cost, visible_pairs
from subquad.interface import Dims, Mixed, MixerConfig, TokenMixer
from subquad.layers.heads import initialise_projection
from subquad.layers.projection import Projection
from subquad.mask import Mask
from subquad.ops.global_local import RelativeTable, global_local_attention, kept_tokens
from subquad.ops.head_split import merge_heads, split_heads
from subquad.ops.pattern.attention import pattern_attention
from subquad.patterns.bands import Window
from subquad.patterns.tokens import Sink
from subquad.state import State

Sharing = Literal["none", "kv", "qkv"]

_QUERIES = {"none": ("global", "long"), "kv": ("global", "long"), "qkv": ("shared", "shared")}
"""Which projection gives the queries of global and of long tokens."""
_GLOBAL_ROWS = {"none": ("global_to_global", "global_to_long"), "kv": ("global", "global"), "qkv": ("shared", "shared")}
"""Which projection gives the keys of global and of long tokens that the global rows see; likewise the values."""
_LONG_ROWS = {"none": ("long_to_global", "long_to_long"), "kv": ("long", "long"), "qkv": ("shared", "shared")}
"""The same for the long rows."""


@dataclass(frozen=True, kw_only=True)
class GlobalLocalOptions:
    """What there is to choose.

    Attributes:
        num_global: g, tokens of the global stream.
        radius: how far a long token sees to either side.
        max_distance: m, where the distances of relative positions are clipped; 0 for no relative positions.
        sharing: keys and values by a projection for each piece, for each softmax ("kv"), or by one that serves all,
            as then for queries too ("qkv").
        share_output: one output projection for both streams.
    """

    num_global: int
    radius: int
    max_distance: int
    sharing: Sharing
    share_output: bool

    @property
    def queries(self) -> tuple[str, str]:
        """Projections of the queries of global and long tokens."""
        return _QUERIES[self.sharing]

    @property
    def global_rows(self) -> tuple[str, str]:
        """Projections of the global and the long keys that global rows see."""
        return _GLOBAL_ROWS[self.sharing]

    @property
    def long_rows(self) -> tuple[str, str]:
        """Projections of the global and the long keys that long rows see."""
        return _LONG_ROWS[self.sharing]

    @property
    def outputs(self) -> tuple[str, str]:
        """Projections of what global and long rows found."""
        return ("shared", "shared") if self.share_output else ("global", "long")

    @property
    def table_rows(self) -> int:
        """Ids of relative positions: the distances -m..m, and pairs of a global and a long token."""
        return 2 * self.max_distance + 2 if self.max_distance else 0


def global_local_cost(options: GlobalLocalOptions, dims: Dims, length: int, dtype_bytes: int) -> Cost:
    """The price of `GlobalLocalMixer`: projections, visible pairs, and one product of every query with its table.

    Autograd keeps the input, the merged heads and, of queries, keys and values, whole projections without relative
    positions and filled blocks with them.
    """
    inner, weights = dims.inner_dim, dims.embed_dim * dims.inner_dim
    count = min(options.num_global, length)
    pairs = (length + length - count) * count + visible_pairs(length - count, left=options.radius, right=options.radius)
    passes = len({options.global_rows, options.long_rows}) if count < length else 1
    tokens, sums = (1 + 2 * passes) * length, max(4, dtype_bytes) * dims.num_heads * length
    if options.table_rows and length:
        tokens, sums = kept_tokens(length, count, options.radius), 0
    inward = len({*options.queries}) + 2 * len({*options.global_rows, *options.long_rows})
    outward = len({*options.outputs})
    biases = (inward * inner + outward * dims.embed_dim) if dims.bias else 0
    return Cost(
        flops=2 * length * (2 + 2 * passes) * weights + 2 * inner * (2 * pairs + length * options.table_rows),
        activation_bytes=dtype_bytes * (length * (dims.embed_dim + inner) + tokens * inner) + sums,
        parameters=(inward + outward) * weights
        + biases
        + 2 * dims.num_heads * options.table_rows * (dims.head_dim + 1),
    )


class Tokens(NamedTuple):
    """Those of a call.

    Attributes:
        both: (B, L, D).
        global_ones: (B, g, D).
        long_ones: (B, L - g, D).
    """

    both: Tensor
    global_ones: Tensor
    long_ones: Tensor


class RelativeScores(nn.Module):
    """What relative positions add to the scores of one softmax."""

    def __init__(self, rows: int, dims: Dims) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(dims.num_heads, rows, dims.head_dim))
        self.biases = nn.Parameter(torch.empty(dims.num_heads, rows))
        self.initialise()

    def initialise(self) -> None:
        """As in ETC's code: vectors from a normal distribution cut at two standard deviations of 0.5, biases 0."""
        nn.init.trunc_normal_(self.vectors, std=0.5, a=-1.0, b=1.0)
        nn.init.zeros_(self.biases)

    def forward(self) -> RelativeTable:
        """The table."""
        return RelativeTable(self.vectors, self.biases)


class GlobalLocalMixer(TokenMixer):
    """A global stream that sees everything, and a long one that sees it and what is near."""

    def __init__(self, config: MixerConfig, dims: Dims, options: GlobalLocalOptions) -> None:
        super().__init__(config, dims)
        self.options = options
        inward = (dims.embed_dim, dims.inner_dim)
        self.project_query = _projections(options.queries, *inward, bias=dims.bias)
        self.project_key = _projections((*options.global_rows, *options.long_rows), *inward, bias=dims.bias)
        self.project_value = _projections((*options.global_rows, *options.long_rows), *inward, bias=dims.bias)
        self.project_out = _projections(options.outputs, dims.inner_dim, dims.embed_dim, bias=dims.bias)
        relative = options.table_rows > 0
        self.global_scores = RelativeScores(options.table_rows, dims) if relative else None
        self.long_scores = RelativeScores(options.table_rows, dims) if relative else None
        self.dropout = nn.Dropout(dims.dropout)

    def initialise(self) -> None:
        """Draw the relative scores."""
        for scores in (self.global_scores, self.long_scores):
            if scores is not None:
                scores.initialise()

    def mix(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, context_mask: Mask | None, state: State | None
    ) -> Mixed:
        """Global rows, then long rows."""
        count, options = min(self.options.num_global, x.shape[1]), self.options
        tokens = Tokens(x, x[:, :count].contiguous(), x[:, count:].contiguous())
        valid = None if mask is None else mask.valid
        global_q, long_q = self._project(self.project_query, options.queries, tokens).tensor_split((count,), dim=2)
        k, v = self._keys_and_values(options.global_rows, tokens)
        rows = [self._attend(global_q, k, v, valid, self.global_scores, None)]
        if count < x.shape[1]:
            if options.long_rows != options.global_rows:
                k, v = self._keys_and_values(options.long_rows, tokens)
            rows.append(self._attend(long_q, k, v, valid, self.long_scores, options.radius))
        outputs = zip(rows, options.outputs, strict=False)  # there may be no long rows
        y = [self.project_out[name](merge_heads(out.to(x.dtype))) for out, name in outputs]
        return Mixed(self.dropout(torch.cat(y, dim=1)))

    def _keys_and_values(self, names: tuple[str, str], tokens: Tokens) -> tuple[Tensor, Tensor]:
        return self._project(self.project_key, names, tokens), self._project(self.project_value, names, tokens)

    def _project(self, layers: nn.ModuleDict, names: tuple[str, str], tokens: Tokens) -> Tensor:
        """Global and long tokens by the layers of these names, in heads: (B, H, L, E)."""
        first, second = names
        if first == second:
            projected = layers[first](tokens.both)
        else:
            projected = torch.cat((layers[first](tokens.global_ones), layers[second](tokens.long_ones)), dim=1)
        return split_heads(projected, self.dims.num_heads)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scores: RelativeScores | None, radius: int | None
    ) -> Tensor:
        """The rows of one stream; radius None for the global ones."""
        count = min(self.options.num_global, k.shape[2])
        if scores is not None:
            key_valid = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if valid is None else valid
            return global_local_attention(q, k, v, scores(), key_valid, num_global=count, radius=radius)
        start = 0 if radius is None else count
        pattern = Sink(k.shape[2]) if radius is None else Sink(count) | Window(radius, radius)
        mask = None if valid is None else Mask(valid[:, start : start + q.shape[2]])
        return pattern_attention(q, k, v, pattern, mask=mask, key_valid=valid, query_offset=start)


def _projections(names: tuple[str, ...], width: int, out_width: int, *, bias: bool) -> nn.ModuleDict:
    """One layer for each different name."""
    layers = nn.ModuleDict()
    for name in dict.fromkeys(names):
        layer = Projection(width, out_width, bias=bias)
        initialise_projection(layer)
        layers[name] = layer
    return layers
