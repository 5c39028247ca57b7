"""Sparse Transformer: each token sees a stretch next to it and a few tokens that sum up what lies further away.

Child et al. 2019, "Generating Long Sequences with Sparse Transformers", arXiv:1904.10509, sections 4.2 to 4.4.

    o_i = softmax over j in A_i of q_i · k_j / √E, l the stride, c the summary
    strided   local: |i - j| <= l          summary: (i - j) mod l = 0       causal: 0 <= i - j < l, j <= i
    fixed     local: ⌊i / l⌋ = ⌊j / l⌋     summary: j mod l >= l - c        causal: j <= i

Cost O(L² c D / l + L l D), c = 1 if strided: O(L √L D) where l grows as √L, which is for the user to choose; the local
set alone costs the second summand. State: all keys and values.

The sets are joined in one softmax ("merged"), shared out to heads ("heads") or to layers, which a model writes
`mixer=[{"name": "sparse_transformer", "combine": "local"}, {"name": "sparse_transformer", "combine": "summary"}]`.
The first l - c tokens have no summary in the causal fixed form and read 0 from it.

Departures: a causal local window holds l keys, as in the official code; the paper's l + 1 by `local_inclusive`. The
official code's "strided" is the summary alone, its "fixed" is merged and counts in blocks of 32 tokens. The
bidirectional forms are not the paper's. Positions count the valid tokens of the sequence or stream: an invalid token
takes no position. The fixed form refuses packed documents, whose blocks would have to begin with each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from subquad.costs import Cost, visible_pairs
from subquad.interface import Dims, MixerConfig, Traits
from subquad.layers.cache import KeyValueCache, attend_cached, empty_cache
from subquad.layers.heads import HeadMixer, Heads, attention_cost, projection_cost
from subquad.mask import Mask
from subquad.ops.packing import Packing
from subquad.ops.pattern.attention import pattern_attention
from subquad.patterns.bands import Causal, Strided, Window
from subquad.patterns.blocks import Block
from subquad.patterns.pattern import Pattern
from subquad.patterns.tokens import Columns
from subquad.registry import register
from subquad.state import State

Part = Literal["merged", "local", "summary"]
"""What one head sees: both sets, or one of them."""


class Pairs(NamedTuple):
    """Visible pairs of one head.

    Attributes:
        local: of the local set.
        summary: of the summary.
        shared: in both.
    """

    local: int
    summary: int
    shared: int

    def of(self, part: Part) -> int:
        """Those of one set, or of both joined."""
        merged = self.local + self.summary - self.shared
        return {"merged": merged, "local": self.local, "summary": self.summary}[part]


@register("sparse_transformer")
@dataclass(frozen=True, kw_only=True)
class SparseTransformerConfig(MixerConfig):
    """Options of the Sparse Transformer's attention."""

    family: ClassVar[str] = "sparse"

    kind: Literal["strided", "fixed"] = "strided"
    """A sliding window and every l-th key, or blocks of l tokens and their last columns."""
    stride: int = 128
    """l, best near √L."""
    summary: int = 8
    """c, columns of a block that every block sees; for kind="fixed". The paper finds 1 too few."""
    combine: Literal["merged", "local", "summary", "heads"] = "merged"
    """Both sets in one softmax, one of them alone, or the local one for the first half of the heads, else the other."""
    summary_sets: int = 1
    """n, head h takes the (h mod n)-th c columns, counted from the end of the block; for kind="fixed"."""
    local_inclusive: bool = False
    """The causal window holds l + 1 keys, as in the paper, not l; for kind="strided"."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.stride < 1:
            raise ValueError(f"sparse_transformer: stride counts tokens and must be at least 1; got {self.stride}")
        if self.summary < 1:
            raise ValueError(
                "sparse_transformer: summary counts the columns of a block and must be at least 1, "
                f"got {self.summary}; for none, take combine='local'"
            )
        if self.kind == "fixed" and self.summary > self.stride:
            raise ValueError(
                f"sparse_transformer: {self.summary} summary columns don't fit into a block of {self.stride} tokens; "
                "lower summary or raise stride"
            )
        if self.summary_sets < 1 or (self.kind == "fixed" and self.summary_sets * self.summary > self.stride):
            raise ValueError(
                f"sparse_transformer: summary_sets must lie in 1..{self.stride // self.summary}, as many sets of "
                f"{self.summary} columns as fit into a block of {self.stride} tokens; got {self.summary_sets}"
            )

    @property
    def traits(self) -> Traits:
        """Blocks are laid over the whole stream, so that only the strided form packs documents."""
        strided = self.kind == "strided"
        return Traits(bidirectional=True, causal=True, padding=True, segments=strided, state=True)

    def check(self, dims: Dims) -> None:
        """Two halves need two heads."""
        if self.combine == "heads" and dims.num_heads < 2:
            raise ValueError(
                "sparse_transformer: combine='heads' gives either set its own heads and needs at least 2, "
                f"got num_heads={dims.num_heads}; take more heads or combine='merged'"
            )

    def part(self, head: int, dims: Dims) -> Part:
        """What a head sees."""
        if self.combine == "heads":
            return "local" if head < dims.num_heads // 2 else "summary"
        return self.combine

    def reach(self, *, causal: bool) -> int:
        """The furthest distance inside the window of the strided form."""
        return self.stride if self.local_inclusive or not causal else self.stride - 1

    def columns(self, head: int) -> Columns:
        """The summary of the fixed form."""
        return Columns(self.stride, self.summary, head % self.summary_sets * self.summary)

    def pattern(self, dims: Dims) -> Pattern:
        """Who sees whom, head by head where they differ."""
        patterns = [self._pattern(head, dims) for head in range(dims.num_heads)]
        return patterns[0].heads({head: own for head, own in enumerate(patterns) if own != patterns[0]})

    def _pattern(self, head: int, dims: Dims) -> Pattern:
        if self.kind == "strided":
            reach = self.reach(causal=dims.causal)
            local, summary = Window(reach, reach), Strided(self.stride)
        else:
            local, summary = Block(self.stride), self.columns(head)
        seen = {"merged": local | summary, "local": local, "summary": summary}[self.part(head, dims)]
        return seen & Causal() if dims.causal else seen

    def pairs(self, head: int, dims: Dims, length: int) -> int:
        """Visible pairs of a head among `length` tokens."""
        if self.kind == "strided":
            pairs = _strided_pairs(length, self.stride, self.reach(causal=dims.causal), causal=dims.causal)
        else:
            pairs = _fixed_pairs(length, self.columns(head), causal=dims.causal)
        return pairs.of(self.part(head, dims))

    def build(self, dims: Dims) -> SparseTransformer:
        """The module."""
        return SparseTransformer(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections, and the visible pairs of every head."""
        pairs = sum(self.pairs(head, dims, length) for head in range(dims.num_heads))
        stored = length if dims.causal else 0
        own = Cost(flops=2 * 2 * pairs * dims.head_dim, state_bytes=2 * stored * dims.inner_dim * max(4, dtype_bytes))
        return projection_cost(dims, length, dtype_bytes) + attention_cost(dims, length, 0, dtype_bytes) + own


class SparseTransformer(HeadMixer):
    """Attention to the near and to summaries of the far."""

    config: SparseTransformerConfig

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """An empty cache."""
        return empty_cache(self.dims, batch_size, device, dtype)

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Attend to both sets; padding is taken out first, so that it takes no position."""
        pattern = self.config.pattern(self.dims)
        if isinstance(state, KeyValueCache):
            return attend_cached("sparse_transformer", heads, pattern, state)
        packing = Packing(heads.mask.valid)
        q, k, v = (packing.pack(tensor) for tensor in (heads.q, *heads.keys_and_values()))
        facts = packing.pack_mask(Mask(heads.mask.valid, heads.mask.segments))
        return packing.unpack(pattern_attention(q, k, v, pattern, mask=facts)), None


def _strided_pairs(length: int, stride: int, reach: int, *, causal: bool) -> Pairs:
    """A window, and pairs of equal remainder, of which those inside the window are shared."""
    full, rest = divmod(length, stride)

    def steps(bound: int | None) -> int:
        """Pairs at most `bound` strides apart: longer and shorter classes of positions of equal remainder."""
        right = 0 if causal else bound
        longer, shorter = (visible_pairs(size, left=bound, right=right) for size in (full + 1, full))
        return rest * longer + (stride - rest) * shorter

    local = visible_pairs(length, left=reach, right=0 if causal else reach)
    return Pairs(local, steps(None), steps(reach // stride))


def _fixed_pairs(length: int, columns: Columns, *, causal: bool) -> Pairs:
    """A block, and columns, of which those of the own block are shared."""
    full, rest = divmod(length, columns.stride)
    whole, short = (min(max(size - columns.first, 0), columns.count) for size in (columns.stride, rest))

    def inside(size: int, places: int) -> int:
        """Pairs inside a block whose key is one of `places` columns; causal, the key at place p has `size` - p."""
        return places * (size - columns.first) - places * (places - 1) // 2 if causal else places * size

    right = 0 if causal else None
    local = full * visible_pairs(columns.stride, right=right) + visible_pairs(rest, right=right)
    shared = full * inside(columns.stride, whole) + inside(rest, short)
    if causal:  # a column is seen by all tokens behind its block
        others = whole * (full * length - columns.stride * full * (full + 1) // 2)
    else:
        others = full * whole * (length - columns.stride) + short * (length - rest)
    return Pairs(local, shared + others, shared)
