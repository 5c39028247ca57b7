"""The streams of Combiner: what a state holds, what a call adds to it, and what it leaves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.interface import Dims
from subquad.layers.heads import Heads
from subquad.ops.combiner.stream import Kept, Sights, Summaries, Summarizer
from subquad.ops.combiner.stream_regions import NO_REGION
from subquad.ops.packing import append, take
from subquad.ops.precision import wide_dtype
from subquad.state import State, state_dataclass


@state_dataclass
class CombinerState(State):
    """The tokens that regions yet to come are made of or queries may see, and summaries of the regions that are whole.

    Columns behind an example's own are zeros.

    Attributes:
        length: int64 (B,).
        queries: (B, H, T, E), of the last tokens: those of the open segment or row, or all, as the plan needs.
        keys: (B, H, T, E).
        values: (B, H, T, E).
        inputs: (B, T, D) where keys of rows are projected from them, else (B, T, 0).
        summary_keys: (B, H, R, E), of the regions that later tokens may see, in the order of their last tokens.
        summary_values: (B, H, R, E).
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    inputs: Tensor
    summary_keys: Tensor
    summary_values: Tensor

    @property
    def begun(self) -> bool:
        """Whether anything was seen yet, by any example."""
        return bool(self.length.any())


def empty_stream(
    dims: Dims, inputs_width: int, batch_size: int, device: torch.device, dtype: torch.dtype
) -> CombinerState:
    """Nothing seen yet."""
    length = torch.zeros(batch_size, dtype=torch.int64, device=device)
    nothing = torch.zeros(batch_size, dims.num_heads, 0, dims.head_dim, device=device, dtype=dtype)
    inputs = torch.zeros(batch_size, 0, inputs_width, device=device, dtype=dtype)
    return CombinerState(length, nothing, nothing.clone(), nothing.clone(), inputs, nothing.clone(), nothing.clone())


def stream_bytes(dims: Dims, inputs_width: int, sights: Sights, length: int, dtype_bytes: int) -> int:
    """Bytes of one example's state after so many tokens, but for the length."""
    lengths = torch.tensor([length])
    tokens, regions = length - int(sights.first(lengths)), sights.kept(lengths).shape[1]
    return dtype_bytes * ((3 * tokens + 2 * regions) * dims.inner_dim + tokens * inputs_width)


class Seen(NamedTuple):
    """A stream after a call, in the call.

    Attributes:
        before: the state that came in.
        kept: the stored tokens and those of the call.
        summaries: the stored ones and those of regions that are whole now.
        sights: the plans.
    """

    before: CombinerState
    kept: Kept
    summaries: Summaries
    sights: Sights

    def attend(self, q: Tensor, log_size: bool) -> Tensor:
        """What the queries (B, H, L, E) of the call find, (B, H, L, E), in the dtype of what is kept."""
        positions = self.before.length[:, None] + torch.arange(q.shape[2], device=q.device)
        return self.sights.attend(q.to(self.kept.k.dtype), positions, self.kept, self.summaries, log_size)

    def next_state(self) -> CombinerState:
        """What the next call needs."""
        kept, summaries, sights = self.kept, self.summaries, self.sights
        first = sights.first(kept.end)
        counts = kept.end - first
        positions = first[:, None] + torch.arange(max([0, *counts.tolist()]), device=first.device)
        columns, there = kept.columns(positions)
        numbers = sights.kept(kept.end)
        stand, needed = summaries.columns(numbers), numbers < NO_REGION
        dtype = self.before.keys.dtype
        q, k, v, x = (_pick(part, columns, there, dtype) for part in (kept.q, kept.k, kept.v, kept.x[:, None]))
        keys, values = (_pick(part, stand, needed, dtype) for part in (summaries.keys, summaries.values))
        return CombinerState(kept.end, q, k, v, x[:, 0], keys, values)


def advance(before: CombinerState, heads: Heads, x: Tensor, sights: Sights, summarizer: Summarizer) -> Seen:
    """Add the tokens of a call, valid ones first, and summarise the regions that they make whole.

    Args:
        before: the state.
        heads: of the call.
        x: its inputs (B, L, D), or (B, L, 0) where nothing is projected from them.
        sights: the plans.
        summarizer: makes summaries.
    """
    q, valid = heads.q, heads.mask.valid
    added = torch.full_like(before.length, q.shape[2]) if valid is None else valid.sum(dim=1)
    kept = _extend(before, q, *heads.keys_and_values(), x, added, sights)
    wanted = sights.closed(before.length, kept.end) if before.begun else sights.needed(kept.end)
    made = sights.summarise(kept, wanted, summarizer)
    return Seen(before, kept, _known(before, sights, kept.k.dtype).join(made), sights)


def _extend(state: CombinerState, q: Tensor, k: Tensor, v: Tensor, x: Tensor, added: Tensor, sights: Sights) -> Kept:
    """The stored tokens and behind them those of a call, of which the first `added` (B,) are valid."""
    first = sights.first(state.length)
    places = (state.length - first)[:, None] + torch.arange(q.shape[2], device=q.device)
    capacity = state.keys.shape[2] + q.shape[2]
    wide = wide_dtype(q)

    def join(old: Tensor, new: Tensor) -> Tensor:
        return append(old.to(wide), new.to(wide), places, capacity)

    inputs = join(state.inputs[:, None], x[:, None])[:, 0]
    tokens = join(state.queries, q), join(state.keys, k), join(state.values, v)
    return Kept(first, state.length + added, *tokens, inputs)


def _known(state: CombinerState, sights: Sights, dtype: torch.dtype) -> Summaries:
    """The stored summaries."""
    numbers = sights.kept(state.length)
    keys, values = (x[:, :, : numbers.shape[1]].to(dtype) for x in (state.summary_keys, state.summary_values))
    return Summaries(numbers, keys, values)


def _pick(x: Tensor, columns: Tensor, there: Tensor, dtype: torch.dtype) -> Tensor:
    return take(x, columns).masked_fill(~there[:, None, :, None], 0.0).to(dtype)
