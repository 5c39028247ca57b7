"""Longformer: a sliding window for every token, and everything for a few global tokens.

Beltagy et al. 2020, "Longformer: The Long-Document Transformer", arXiv:2004.05150.

    i not global: one softmax over {j global} ∪ {|i - j| <= (W - 1) / 2} of q_i · k_j / √E
    i global:     softmax over all j of q'_i · k'_j / √E, with projections W'_q, W'_k, W'_v of its own

Cost O(L (W + G) D) for G global tokens, plus their projections. Which tokens are global is each example's own choice
(`Mask.global_tokens`); without any, the second projections are not used. Causal: both sets are cut at j <= i.

Departures: W counts the keys, itself included (the paper's w is W - 1); padding that is marked global counts as
padding, as in the official code. The paper leaves the causal form with global tokens undefined; here a global token
sees, and is seen by, what causality allows. Distances are counted in the padded sequence, as in the official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.heads import HeadMixer, Heads, initialise_projection, projection_cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.mask import token_positions
from subquad.ops.packing import take, valid_first
from subquad.ops.rotary import rotate
from subquad.ops.softmax import KeySet, sliced_attention
from subquad.ops.window import ExtraKeys, Window, window_attention, window_cost, window_sides
from subquad.registry import register
from subquad.state import State


@register("longformer")
@dataclass(frozen=True, kw_only=True)
class LongformerConfig(MixerConfig):
    """Options of Longformer."""

    family: ClassVar[str] = "sparse"

    window: int = 129
    """W, keys that a token sees around itself, itself included; odd unless causal."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"longformer: window counts the keys a token sees, itself included; got {self.window}")

    @property
    def traits(self) -> Traits:
        """Window and global tokens."""
        return Traits(bidirectional=True, causal=True, padding=True, segments=True, global_tokens=True)

    def check(self, dims: Dims) -> None:
        """A two-sided window is symmetric, hence odd."""
        window_sides("longformer", self.window, causal=dims.causal)

    def build(self, dims: Dims) -> Longformer:
        """The module."""
        return Longformer(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections, the window, and for G global tokens, the first ones, their columns, rows and projections."""
        left, right = window_sides("longformer", self.window, causal=dims.causal)
        attention = window_cost(length, left, right, dims.inner_dim, dtype_bytes)
        parameters = 3 * (dims.embed_dim + 1 if dims.bias else dims.embed_dim) * dims.inner_dim
        total = projection_cost(dims, length, dtype_bytes) + attention + Cost(parameters=parameters)
        return total + self._global_cost(dims, length, dtype_bytes) if dims.num_global and length else total

    def _global_cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """What the global tokens add; a key that is global leaves the window, where it would count twice.

        Autograd keeps the second k and v, the first ones from which the global columns are taken, x and q of the global
        rows, and without causality their result and mask (causally both are made again).
        """
        left, right = window_sides("longformer", self.window, causal=dims.causal)
        count, inner = min(dims.num_global, length), dims.inner_dim
        in_windows = sum(min(length, key + left + 1) - max(0, key - right) for key in range(count))
        causal_rows = count * (count + 1) // 2
        columns = count * length - (causal_rows - count if dims.causal else 0)
        rows = causal_rows if dims.causal else count * length
        kept = 4 * length * inner + count * (dims.embed_dim + inner) + (0 if dims.causal else count * inner + length)
        return Cost(
            flops=2 * (2 * length + count) * dims.embed_dim * inner + 2 * 2 * (columns + rows - in_windows) * inner,
            activation_bytes=dtype_bytes * kept + (0 if dims.causal else max(4, dtype_bytes) * dims.num_heads * count),
        )


class Chosen(NamedTuple):
    """The global tokens of each example, in order, in as many slots as the example with most of them needs.

    Attributes:
        places: int64 (B, G).
        filled: bool (B, G), False for a slot that this example doesn't need.
    """

    places: Tensor
    filled: Tensor


class Longformer(HeadMixer):
    """Window and global tokens, with two sets of projections."""

    config: LongformerConfig

    def __init__(self, config: LongformerConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.project_global_query = nn.Linear(dims.embed_dim, dims.inner_dim, bias=dims.bias)
        self.project_global_key = nn.Linear(dims.embed_dim, dims.inner_dim, bias=dims.bias)
        self.project_global_value = nn.Linear(dims.embed_dim, dims.inner_dim, bias=dims.bias)
        for projection in (self.project_global_query, self.project_global_key, self.project_global_value):
            initialise_projection(projection)

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Window and global columns in one softmax; the rows of global tokens, computed apart, take their place."""
        assert heads.k is not None
        assert heads.v is not None
        batch_size, _, length, _ = heads.q.shape
        valid = heads.mask.valid
        if valid is None:
            valid = torch.ones(batch_size, length, dtype=torch.bool, device=heads.q.device)
        is_global = None if heads.mask.global_tokens is None else heads.mask.global_tokens & valid
        count = 0 if is_global is None else int(is_global.sum(dim=1).max())
        if is_global is None or count == 0:
            return self._attend_window(heads, valid, None), None
        chosen = _choose(is_global, count)
        extra = self._global_columns(heads, chosen)
        out = self._attend_window(heads, valid & ~is_global, extra)
        rows = self._attend_rows(heads, valid, chosen)
        room = torch.zeros_like(out[:, :, :1]).expand(-1, -1, length + 1, -1)
        target = chosen.places.masked_fill(~chosen.filled, length)[:, None, :, None].expand_as(rows)
        placed = room.scatter(2, target, rows)[:, :, :length]
        return torch.where(is_global[:, None, :, None], placed, out), None

    def _attend_window(self, heads: Heads, key_valid: Tensor, extra: ExtraKeys | None) -> Tensor:
        assert heads.k is not None
        assert heads.v is not None
        left, right = window_sides("longformer", self.config.window, causal=self.dims.causal)
        reach = max(heads.q.shape[2] - 1, 0)
        left, right = min(left, reach), min(right, reach)
        segments = heads.mask.segments
        key_segments = None if segments is None else F.pad(segments, (left, 0))
        window = Window(left, right, F.pad(key_valid, (left, 0)), segments, key_segments)
        k, v = (F.pad(tensor, (0, 0, left, 0)) for tensor in (heads.k, heads.v))
        return window_attention(heads.q, k, v, window, extra)

    def _global_columns(self, heads: Heads, chosen: Chosen) -> ExtraKeys:
        """Keys and values of the global tokens, by the ordinary projections, for every token to see."""
        assert heads.k is not None
        assert heads.v is not None
        visible = chosen.filled[:, None, :].expand(-1, heads.q.shape[2], -1)
        if heads.mask.segments is not None:
            visible = visible & (heads.mask.segments[..., None] == take(heads.mask.segments, chosen.places)[:, None, :])
        if self.dims.causal:
            visible = visible & (
                chosen.places[:, None, :] <= torch.arange(visible.shape[1], device=visible.device)[:, None]
            )
        return ExtraKeys(take(heads.k, chosen.places), take(heads.v, chosen.places), visible)

    def _attend_rows(self, heads: Heads, valid: Tensor, chosen: Chosen) -> Tensor:
        """What the global tokens see, by the projections of their own: (B, H, G, E)."""
        chosen_x = heads.x.gather(1, chosen.places[..., None].expand(-1, -1, heads.x.shape[2]))
        q = self.split(self.project_global_query(chosen_x))
        k, v = self.split(self.project_global_key(heads.x)), self.split(self.project_global_value(heads.x))
        if self.dims.positions == "rotary":
            positions = token_positions(heads.mask, k.shape[0], k.shape[2], device=k.device)
            q, k = rotate(q, take(positions, chosen.places)), rotate(k, positions)
        segments = heads.mask.segments
        query_segments = None if segments is None else take(segments, chosen.places)
        last_key = chosen.places if self.dims.causal else None
        return sliced_attention(q, k, v, KeySet(valid, query_segments, segments, last_key))


def _choose(is_global: Tensor, count: int) -> Chosen:
    filled = torch.arange(count, device=is_global.device) < is_global.sum(dim=1)[:, None]
    return Chosen(valid_first(is_global)[:, :count], filled)
