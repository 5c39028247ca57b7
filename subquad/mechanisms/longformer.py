"""Longformer: a sliding window for every token, and everything for a few global tokens.

Beltagy et al. 2020, "Longformer: The Long-Document Transformer", arXiv:2004.05150, section 3.

    i not global: one softmax over {j global} ∪ {i - j = d u, |u| <= (W - 1) / 2} of q_i · k_j / √E
    i global:     softmax over all j of q'_i · k'_j / √E, with projections W'_q, W'_k, W'_v of its own

Cost O(L (W + G) D) for G global tokens, plus their projections. Which tokens are global is each example's own choice
(`Mask.global_tokens`); without any, the second projections are not used. Causal: both sets are cut at j <= i. The step
d can differ by head. The paper's windows that grow from layer to layer are a list of mixers:
`mixer=[{"name": "longformer", "window": 65}, {"name": "longformer", "window": 129}]`.

Departures: W counts the keys, itself included (the paper's w is W - 1), and d is the step between them, 1 for a plain
window, as in the official code (the paper's tables count the gaps, d - 1). Padding that is marked global counts as
padding, as in the official code. The paper leaves the causal form with global tokens undefined; here a global token
sees, and is seen by, what causality allows. Distances are counted in the padded sequence, as in the official code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.costs import Cost, visible_pairs, window_sides
from subquad.interface import Dims, MixerConfig, Traits
from subquad.layers.heads import HeadMixer, Heads, attention_cost, initialise_projection, projection_cost
from subquad.layers.projection import Projection
from subquad.mask import Mask, token_positions
from subquad.ops.packing import take, valid_first
from subquad.ops.pattern.attention import pattern_attention
from subquad.ops.rotary import rotate
from subquad.patterns.bands import Dilated
from subquad.patterns.pattern import Pattern
from subquad.patterns.tokens import Sink
from subquad.registry import register
from subquad.state import State

LARGEST_MASK = 2**21
"""Pairs of global tokens and keys, over the whole batch, whose mask is held at a time."""


@register("longformer")
@dataclass(frozen=True, kw_only=True)
class LongformerConfig(MixerConfig):
    """Options of Longformer."""

    family: ClassVar[str] = "sparse"

    window: int = 129
    """W, keys that a token sees around itself, itself included; odd unless causal."""
    dilation: int | tuple[int, ...] = (1,)
    """d, the step between the keys of a window: one for all heads, or one for each, as (1, 1, 1, 1, 1, 1, 2, 2)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"longformer: window counts the keys a token sees, itself included; got {self.window}")
        if not self._steps or min(self._steps) < 1:
            raise ValueError(
                "longformer: dilation is the step between keys, 1 for a plain window, one for all heads or one for "
                f"each; got {self.dilation}"
            )

    @property
    def _steps(self) -> tuple[int, ...]:
        return (self.dilation,) if isinstance(self.dilation, int) else self.dilation

    @property
    def traits(self) -> Traits:
        """Window and global tokens."""
        return Traits(bidirectional=True, causal=True, padding=True, segments=True, global_tokens=True)

    def check(self, dims: Dims) -> None:
        """A two-sided window is symmetric, hence odd; steps by head need as many heads."""
        window_sides("longformer", self.window, causal=dims.causal)
        if len(self._steps) not in (1, dims.num_heads):
            raise ValueError(
                f"longformer: dilation has {len(self._steps)} values for {dims.num_heads} heads; give one for all "
                "heads, or one for each"
            )

    def dilations(self, num_heads: int) -> tuple[int, ...]:
        """The step of each head."""
        return self._steps * num_heads if len(self._steps) == 1 else self._steps

    def pattern(self, dims: Dims) -> Pattern:
        """The windows of all heads."""
        left, right = window_sides("longformer", self.window, causal=dims.causal)
        first, *others = self.dilations(dims.num_heads)
        own = {head: Dilated(left, right, step) for head, step in enumerate(others, start=1) if step != first}
        pattern = Dilated(left, right, first).heads(own) if own else Dilated(left, right, first)
        if dims.causal or right:
            return pattern
        return pattern | Sink(0)  # alone, a window of one key would pass for causal, and hide global tokens ahead

    def build(self, dims: Dims) -> Longformer:
        """The module."""
        return Longformer(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections, windows and columns of each head, and for G global tokens, the first ones, their rows."""
        one_head, count = replace(dims, num_heads=1), min(dims.num_global, length)
        columns = count * length - (count * (count - 1) // 2 if dims.causal else 0)
        total = projection_cost(dims, length, dtype_bytes)
        total += Cost(parameters=3 * (dims.embed_dim + 1 if dims.bias else dims.embed_dim) * dims.inner_dim)
        for step in self.dilations(dims.num_heads):
            pairs = self._window_pairs(dims, length, step) + columns - self._seen_twice(dims, length, step)
            total += attention_cost(one_head, length, pairs, dtype_bytes)
        return total + self._rows_cost(dims, length, dtype_bytes) if count else total

    def _window_pairs(self, dims: Dims, length: int, step: int) -> int:
        """Pairs inside the window: positions of equal residue modulo the step form sequences of their own."""
        left, right = window_sides("longformer", self.window, causal=dims.causal)
        shorter, longer_ones = divmod(length, step)
        pairs = longer_ones * visible_pairs(shorter + 1, left=left, right=right)
        return pairs + (step - longer_ones) * visible_pairs(shorter, left=left, right=right)

    def _seen_twice(self, dims: Dims, length: int, step: int) -> int:
        """Pairs of the window whose key is global; they count once."""
        left, right = window_sides("longformer", self.window, causal=dims.causal)
        keys = range(min(dims.num_global, length))
        return sum(1 + min(left, (length - 1 - key) // step) + min(right, key // step) for key in keys)

    def _rows_cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """The rows of the global tokens.

        Autograd keeps the second k and v, x and q of the rows, and, since the rows take the place of others, the
        result without them.
        """
        count, inner = min(dims.num_global, length), dims.inner_dim
        pairs = count * (count + 1) // 2 if dims.causal else count * length
        return Cost(
            flops=2 * (2 * length + count) * dims.embed_dim * inner + 2 * 2 * pairs * inner,
            activation_bytes=dtype_bytes * (3 * length * inner + count * (dims.embed_dim + inner)),
        )


class Chosen(NamedTuple):
    """The global tokens of each example, in order, in as many slots as the example with most of them needs.

    Attributes:
        places: int64 (B, G); a slot that this example doesn't need holds the place of another token.
        filled: bool (B, G), False for such a slot.
    """

    places: Tensor
    filled: Tensor


class Longformer(HeadMixer):
    """Window and global tokens, with two sets of projections."""

    config: LongformerConfig

    def __init__(self, config: LongformerConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.project_global_query = Projection(dims.embed_dim, dims.inner_dim, bias=dims.bias)
        self.project_global_key = Projection(dims.embed_dim, dims.inner_dim, bias=dims.bias)
        self.project_global_value = Projection(dims.embed_dim, dims.inner_dim, bias=dims.bias)
        for projection in (self.project_global_query, self.project_global_key, self.project_global_value):
            initialise_projection(projection)

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Window and global columns in one softmax; the rows of global tokens, computed apart, take their place."""
        k, v = heads.keys_and_values()
        facts, chosen = replace(heads.mask, global_tokens=None), _choose(heads.mask)
        if chosen is not None:
            facts = replace(facts, global_tokens=heads.mask.global_tokens)
        out = pattern_attention(heads.q, k, v, self.config.pattern(self.dims), mask=facts)
        if chosen is None:
            return out, None
        rows = torch.where(chosen.filled[:, None, :, None], self._attend_rows(heads, chosen), take(out, chosen.places))
        return out.scatter(2, chosen.places[:, None, :, None].expand_as(rows), rows), None

    def _attend_rows(self, heads: Heads, chosen: Chosen) -> Tensor:
        """What the global tokens see, by the projections of their own: (B, H, G, E)."""
        chosen_x = heads.x.gather(1, chosen.places[..., None].expand(-1, -1, heads.x.shape[2]))
        q = self.split(self.project_global_query(chosen_x))
        k, v = self.split(self.project_global_key(heads.x)), self.split(self.project_global_value(heads.x))
        if self.dims.positions == "rotary":
            positions = token_positions(heads.mask, k.shape[0], k.shape[2], device=k.device)
            q, k = rotate(q, take(positions, chosen.places)), rotate(k, positions)
        height = max(1, LARGEST_MASK // max(1, k.shape[0] * k.shape[2]))
        slices = zip(q.split(height, dim=2), chosen.places.split(height, dim=1), strict=True)
        attend = partial(checkpoint, _attend_slice, use_reentrant=False, preserve_rng_state=False)
        # The mask of a slice is made again in the backward pass: kept, all together would weigh G x L.
        return torch.cat([attend(part, k, v, places, heads.mask, self.dims.causal) for part, places in slices], dim=2)


def _choose(mask: Mask) -> Chosen | None:
    """The global tokens that are no padding; None without any."""
    if mask.global_tokens is None:
        return None
    is_global = mask.global_tokens if mask.valid is None else mask.global_tokens & mask.valid
    counts = is_global.sum(dim=1, keepdim=True)
    count = max([0, *counts[:, 0].tolist()])
    filled = torch.arange(count, device=counts.device) < counts
    return Chosen(valid_first(is_global)[:, :count], filled) if count else None


def _attend_slice(q: Tensor, k: Tensor, v: Tensor, places: Tensor, mask: Mask, causal: bool) -> Tensor:
    """Rows of queries at the given places (B, G), over all keys that the mask and causality allow."""
    visible = torch.ones(*places.shape, k.shape[2], dtype=torch.bool, device=q.device)
    if mask.valid is not None:
        visible = visible & mask.valid[:, None, :]
    if mask.segments is not None:
        visible = visible & (take(mask.segments, places)[..., None] == mask.segments[:, None, :])
    if causal:
        visible = visible & (torch.arange(k.shape[2], device=q.device) <= places[..., None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])
