"""Local: softmax attention inside a sliding window.

Parmar et al. 2018, "Image Transformer", arXiv:1802.05751 (attention in a local neighbourhood); as a sliding window in
Beltagy et al. 2020, arXiv:2004.05150, section 3.1.

    o_i = softmax over |i - j| <= (W - 1) / 2 of q_i · k_j / √E        causal: 0 <= i - j < W

Cost O(L W D); state: the last W - 1 keys and values. A token reaches n (W - 1) / 2 tokens away after n layers.

Departures: Long Range Arena's "local attention" gathers positions of equal index modulo the number of blocks, which is
not local; it is not reproduced. Distances count valid tokens: an invalid token takes no position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from subquad.costs import Cost
from subquad.heads import HeadMixer, Heads, projection_cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.mask import continue_segments
from subquad.ops.packing import has_gaps, put_back, take, valid_first
from subquad.ops.window import Window, window_attention, window_cost, window_sides
from subquad.registry import register
from subquad.state import State, state_dataclass


@register("local")
@dataclass(frozen=True, kw_only=True)
class LocalConfig(MixerConfig):
    """Options of windowed attention."""

    family: ClassVar[str] = "sparse"

    window: int = 129
    """W, keys that a token sees, itself included; odd unless causal."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"local: window counts the keys a token sees, itself included; got {self.window}")

    @property
    def traits(self) -> Traits:
        """No cross-attention: a window needs one order for queries and keys."""
        return Traits(bidirectional=True, causal=True, padding=True, segments=True, state=True, constant_state=True)

    def check(self, dims: Dims) -> None:
        """A two-sided window is symmetric, hence odd."""
        window_sides("local", self.window, causal=dims.causal)

    def build(self, dims: Dims) -> Local:
        """The module."""
        return Local(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections and the pairs inside the window."""
        left, right = window_sides("local", self.window, causal=dims.causal)
        stored = self.window - 1 if dims.causal else 0
        attention = window_cost(length, left, right, dims.inner_dim, dtype_bytes)
        state = Cost(state_bytes=2 * stored * dims.inner_dim * max(4, dtype_bytes))
        return projection_cost(dims, length, dtype_bytes) + attention + state


@state_dataclass
class WindowState(State):
    """The last W - 1 valid tokens, the newest in the last column; columns older than the stream are zeros.

    Attributes:
        length: int64 (B,).
        keys: (B, H, W - 1, E).
        values: (B, H, W - 1, E).
        segments: int64 (B, W - 1).
    """

    keys: Tensor
    values: Tensor
    segments: Tensor


class Local(HeadMixer):
    """Attention inside a sliding window."""

    config: LocalConfig

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> WindowState:
        """Nothing seen yet."""
        return self._nothing_before(self.config.window - 1, batch_size, device, dtype)

    def _nothing_before(self, columns: int, batch_size: int, device: torch.device, dtype: torch.dtype) -> WindowState:
        keys = torch.zeros(batch_size, self.dims.num_heads, columns, self.dims.head_dim, device=device, dtype=dtype)
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        segments = torch.zeros(batch_size, columns, dtype=torch.int64, device=device)
        return WindowState(length, keys, keys.clone(), segments)

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Attend inside the window; padding is taken out first, so that it takes no position."""
        q, k, v, mask = heads.q, heads.k, heads.v, heads.mask
        assert k is not None
        assert v is not None
        batch_size, _, length, _ = q.shape
        left, right = window_sides("local", self.config.window, causal=self.dims.causal)
        reach = max(length - 1, 0)
        if isinstance(state, WindowState):
            before = state
        else:
            left, right = min(left, reach), min(right, reach)
            before = self._nothing_before(left, batch_size, q.device, q.dtype)
        last_segment = before.segments[:, -1] if left else torch.zeros_like(before.length)
        segments = continue_segments("local", last_segment, before.length, mask, length)
        valid = torch.ones_like(segments, dtype=torch.bool) if mask.valid is None else mask.valid
        order = valid_first(mask.valid) if mask.valid is not None and has_gaps(mask.valid) else None
        if order is not None:
            q, k, v, valid, segments = (take(tensor, order) for tensor in (q, k, v, valid, segments))
        k, v = (torch.cat((old.to(q.dtype), new), dim=2) for old, new in ((before.keys, k), (before.values, v)))
        known = torch.arange(left, device=q.device) >= left - before.length[:, None]
        key_segments = torch.cat((before.segments, segments), dim=1)
        window = Window(left, right, torch.cat((known, valid), dim=1))
        if mask.segments is not None or state is not None:
            window = window._replace(query_segments=segments, key_segments=key_segments)
        out = window_attention(q, k, v, window)
        after = None if state is None else _keep_newest(before, k, v, key_segments, valid.sum(dim=1))
        return (out if order is None else put_back(out, order)), after


def _keep_newest(before: WindowState, k: Tensor, v: Tensor, segments: Tensor, added: Tensor) -> WindowState:
    """The columns that end with the newest valid token; `added` (B,) of this call's tokens, the first, are valid."""
    columns = torch.arange(before.keys.shape[2], device=k.device) + added[:, None]
    kept = (take(tensor, columns) for tensor in (k, v))
    keys, values = (tensor.to(before.keys.dtype) for tensor in kept)
    return WindowState(before.length + added, keys, values, take(segments, columns))
