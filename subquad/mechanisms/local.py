"""Local: softmax attention inside a sliding window, or inside blocks.

Parmar et al. 2018, "Image Transformer", arXiv:1802.05751 (attention in a local neighbourhood, in blocks); as a sliding
window in Beltagy et al. 2020, arXiv:2004.05150, section 3.1.

    sliding: o_i = softmax over |i - j| <= (W - 1) / 2 of q_i · k_j / √E        causal: 0 <= i - j < W
    block:   o_i = softmax over |⌊i / b⌋ - ⌊j / b⌋| <= n of q_i · k_j / √E      causal: ⌊i / b⌋ - ⌊j / b⌋ <= n, j <= i

Cost O(L W D), for blocks W = (2n + 1) b, causal (n + 1) b. State: the last W - 1 keys and values. A token reaches
(W - 1) / 2 tokens away in a layer, and in blocks, where n = 0 never leaves the block, n b to 2 n b.

Departures: Long Range Arena's "local attention" gathers positions of equal index modulo the number of blocks, which is
not local; it is not reproduced. Distances and blocks count valid tokens: an invalid token takes no position. The blocks
of a packed document begin with its first token, so that it gives what it gives alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from subquad.costs import Cost, visible_pairs, window_sides
from subquad.interface import Dims, MixerConfig, Traits
from subquad.layers.heads import BY_HEADS, HeadMixer, Heads, attention_cost, projection_cost
from subquad.mask import Mask, continue_segments
from subquad.ops.block_columns import BlockColumns, block_columns
from subquad.ops.packing import Packing, append, take
from subquad.ops.pattern.attention import pattern_attention
from subquad.patterns.bands import Causal, Window
from subquad.patterns.blocks import BlockWindow
from subquad.patterns.pattern import Pattern
from subquad.registry import register
from subquad.state import State, state_dataclass


class BlockedWindow(NamedTuple):
    """A window of whole blocks; a sliding window is one of blocks of a single token.

    Attributes:
        size: tokens of a block.
        left: blocks before its own that a query sees.
        right: blocks after it.
        causal: no key after the query is seen.
    """

    size: int
    left: int
    right: int
    causal: bool

    @property
    def stored(self) -> int:
        """Columns of the state: all that the next token may see, wherever in its block it stands."""
        return (self.left + 1) * self.size - 1

    @property
    def pattern(self) -> Pattern:
        """Who sees whom."""
        if self.size == 1:
            return Window(self.left, self.right)
        blocks = BlockWindow(self.size, self.left, self.right)
        return blocks & Causal() if self.causal else blocks

    def pairs(self, length: int) -> int:
        """Visible pairs among `length` tokens: inside the own block, and between it and its neighbours."""
        full, rest = divmod(length, self.size)
        right = 0 if self.causal else None
        own = full * visible_pairs(self.size, right=right) + visible_pairs(rest, right=right)
        between = self.size**2 * (visible_pairs(full, left=self.left, right=self.right) - full)
        return own + between + self.size * rest * (min(self.left, full) + min(self.right, full))


@register("local")
@dataclass(frozen=True, kw_only=True)
class LocalConfig(MixerConfig):
    """Options of local attention."""

    family: ClassVar[str] = "sparse"

    kind: Literal["sliding", "block"] = "sliding"
    """A window around each token, or blocks with their neighbours."""
    window: int = 129
    """W, keys that a token sees in a sliding window, itself included; odd unless causal."""
    block: int = 64
    """b, tokens of a block; for kind="block"."""
    neighbours: int = 1
    """n, whole blocks seen on each side of the own one, causal: before it; for kind="block"."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"local: window counts the keys a token sees, itself included; got {self.window}")
        if self.block < 1:
            raise ValueError(f"local: block counts the tokens of a block and must be at least 1; got {self.block}")
        if self.neighbours < 0:
            raise ValueError(f"local: neighbours counts blocks beside the own one, 0 for none; got {self.neighbours}")

    @property
    def traits(self) -> Traits:
        """No cross-attention: a window needs one order for queries and keys."""
        return Traits(bidirectional=True, causal=True, padding=True, segments=True, state=True, constant_state=True)

    def check(self, dims: Dims) -> None:
        """A two-sided window is symmetric, hence odd."""
        self.grid(causal=dims.causal)

    def grid(self, *, causal: bool) -> BlockedWindow:
        """The window in blocks."""
        if self.kind == "block":
            return BlockedWindow(self.block, self.neighbours, 0 if causal else self.neighbours, causal)
        return BlockedWindow(1, *window_sides("local", self.window, causal=causal), causal)

    def build(self, dims: Dims) -> Local:
        """The module."""
        return Local(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections and the pairs inside the window."""
        grid = self.grid(causal=dims.causal)
        attention = attention_cost(dims, length, grid.pairs(length), dtype_bytes)
        stored = grid.stored if dims.causal else 0
        state = Cost(state_bytes=2 * stored * dims.inner_dim * max(4, dtype_bytes))
        return projection_cost(dims, length, dtype_bytes) + attention + state


@state_dataclass
class WindowState(State):
    """The newest valid tokens: as many whole blocks as the next token sees, and those before it in its own block.

    The next token goes to column left * size + `place`, one column per token before it. For a sliding window, whose
    blocks are single tokens, these are the last W - 1 tokens, the newest in the last column.

    Attributes:
        length: int64 (B,).
        keys: (B, H, T, E); columns that hold no token are zeros.
        values: (B, H, T, E).
        seen: bool (B, T), whether a column holds a token of the newest document.
        segment: int64 (B,), the number of that document.
        place: int64 (B,), of the next token in its block, if it belongs to that document.
    """

    keys: Tensor
    values: Tensor
    seen: Tensor
    segment: Tensor
    place: Tensor


class Stretch(NamedTuple):
    """All columns that a call sees.

    Attributes:
        keys: (B, H, S, E).
        values: (B, H, S, E).
        seen: bool (B, S), whether a column holds a token that may be seen.
        documents: int64 (B, S), numbered as in `BlockColumns`.
        offset: int64 (B,), the first free column.
    """

    keys: Tensor
    values: Tensor
    seen: Tensor
    documents: Tensor
    offset: Tensor


class Local(HeadMixer):
    """Attention inside a sliding window or inside blocks."""

    parting = BY_HEADS
    config: LocalConfig

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> WindowState:
        """Nothing seen yet."""
        stored = self.config.grid(causal=self.dims.causal).stored
        keys = torch.zeros(batch_size, self.dims.num_heads, stored, self.dims.head_dim, device=device, dtype=dtype)
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        seen = torch.zeros(batch_size, stored, dtype=torch.bool, device=device)
        return WindowState(length, keys, keys.clone(), seen, length.clone(), length.clone())

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Attend inside the window; padding is taken out first, so that it takes no position."""
        k, v = heads.keys_and_values()
        q, mask = heads.q, Mask(heads.mask.valid, heads.mask.segments)
        grid, before = self.config.grid(causal=self.dims.causal), state if isinstance(state, WindowState) else None
        if before is not None and mask.segments is not None:
            mask = Mask(mask.valid, continue_segments("local", before.segment, before.length, mask, q.shape[2]))
        packing = Packing(mask.valid)
        q, k, v, mask = *(packing.pack(tensor) for tensor in (q, k, v)), packing.pack_mask(mask)
        if before is None and (mask.segments is None or grid.size == 1):
            out, after = pattern_attention(q, k, v, grid.pattern, mask=mask), None
        else:
            nothing = self.new_state(q.shape[0], q.device, q.dtype)
            out, after = _attend_placed(q, k, v, mask, grid, nothing if before is None else before)
        return packing.unpack(out), None if before is None else after


def _attend_placed(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, grid: BlockedWindow, before: WindowState
) -> tuple[Tensor, WindowState]:
    """Attend to the columns of a state and to this call's tokens, each in its column; valid tokens come first."""
    valid = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if mask.valid is None else mask.valid
    placed = block_columns(valid, mask.segments, grid.size, last_segment=before.segment, place=before.place)
    stretch = _extend(before, k, v, placed, grid)
    spread = mask.segments is not None  # else the queries follow each other as they are
    out = pattern_attention(
        placed.spread(q) if spread else q,
        stretch.keys,
        stretch.values,
        grid.pattern,
        mask=Mask(segments=placed.spread(placed.documents).cummax(dim=1).values) if spread else mask,
        key_valid=stretch.seen,
        key_segments=stretch.documents if spread else None,
        query_offset=stretch.offset,
    )
    return placed.collect(out) if spread else out, _next_state(before, stretch, placed, mask, grid)


def _extend(before: WindowState, k: Tensor, v: Tensor, placed: BlockColumns, grid: BlockedWindow) -> Stretch:
    """The columns of the state and behind them this call's, with room for the rest of the last block."""
    offset = grid.left * grid.size + before.place
    total = grid.stored + placed.width + grid.size - 1
    columns = (offset[:, None] + placed.columns).masked_fill(~placed.valid, total)
    keys, values = (append(old.to(k.dtype), new, columns, total) for old, new in ((before.keys, k), (before.values, v)))
    documents = append(torch.zeros_like(before.seen, dtype=torch.int64), placed.documents, columns, total)
    seen = append(before.seen, placed.valid, columns, total)
    return Stretch(keys, values, seen, documents.cummax(dim=1).values, offset)


def _next_state(
    before: WindowState, stretch: Stretch, placed: BlockColumns, mask: Mask, grid: BlockedWindow
) -> WindowState:
    """The columns that the next token may see: those of the block in which it stands and of `left` blocks before."""
    behind, document = placed.end()
    end, added, segment = stretch.offset + behind, placed.valid.sum(dim=1), before.segment
    if mask.segments is not None:
        newest = take(mask.segments, (added - 1).clamp_min(0)[:, None])[:, 0]
        segment = torch.where(added > 0, newest, segment)
    first = (end // grid.size - grid.left) * grid.size
    kept = first[:, None] + torch.arange(grid.stored, device=end.device)
    return WindowState(
        before.length + added,
        take(stretch.keys, kept).to(before.keys.dtype),
        take(stretch.values, kept).to(before.values.dtype),
        take(stretch.seen & (stretch.documents == document[:, None]), kept),
        segment,
        end % grid.size,
    )
