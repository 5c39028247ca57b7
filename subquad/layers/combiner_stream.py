"""The streams of Combiner: what a state holds, what a call adds to it, and what it leaves."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.interface import Dims
from subquad.ops.combiner.stream import Kept, Sights, Summaries
from subquad.ops.combiner.stream_regions import NO_REGION
from subquad.ops.packing import append, take
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


def empty_stream(
    dims: Dims, inputs_width: int, batch_size: int, device: torch.device, dtype: torch.dtype
) -> CombinerState:
    """Nothing seen yet."""
    length = torch.zeros(batch_size, dtype=torch.int64, device=device)
    nothing = torch.zeros(batch_size, dims.num_heads, 0, dims.head_dim, device=device, dtype=dtype)
    inputs = torch.zeros(batch_size, 0, inputs_width, device=device, dtype=dtype)
    return CombinerState(length, nothing, nothing.clone(), nothing.clone(), inputs, nothing.clone(), nothing.clone())


def extend(state: CombinerState, q: Tensor, k: Tensor, v: Tensor, x: Tensor, added: Tensor, sights: Sights) -> Kept:
    """The stored tokens and behind them those of a call, of which the first `added` (B,) are valid."""
    first = sights.first(state.length)
    places = (state.length - first)[:, None] + torch.arange(q.shape[2], device=q.device)
    capacity = state.keys.shape[2] + q.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)

    def join(old: Tensor, new: Tensor) -> Tensor:
        return append(old.to(wide), new.to(wide), places, capacity)

    inputs = join(state.inputs[:, None], x[:, None])[:, 0]
    tokens = join(state.queries, q), join(state.keys, k), join(state.values, v)
    return Kept(first, state.length + added, *tokens, inputs)


def known(state: CombinerState, sights: Sights, dtype: torch.dtype) -> Summaries:
    """The stored summaries."""
    numbers = sights.kept(state.length)
    keys, values = (x[:, :, : numbers.shape[1]].to(dtype) for x in (state.summary_keys, state.summary_values))
    return Summaries(numbers, keys, values)


def next_state(state: CombinerState, kept: Kept, summaries: Summaries, sights: Sights) -> CombinerState:
    """What the next call needs."""
    first = sights.first(kept.end)
    counts = kept.end - first
    positions = first[:, None] + torch.arange(max([0, *counts.tolist()]), device=first.device)
    columns, there = kept.columns(positions)
    numbers = sights.kept(kept.end)
    stand, needed = summaries.columns(numbers), numbers < NO_REGION
    dtype = state.keys.dtype
    q, k, v, x = (_pick(part, columns, there, dtype) for part in (kept.q, kept.k, kept.v, kept.x[:, None]))
    keys, values = (_pick(part, stand, needed, dtype) for part in (summaries.keys, summaries.values))
    return CombinerState(kept.end, q, k, v, x[:, 0], keys, values)


def _pick(x: Tensor, columns: Tensor, there: Tensor, dtype: torch.dtype) -> Tensor:
    return take(x, columns).masked_fill(~there[:, None, :, None], 0.0).to(dtype)
