"""The streams of the Compressive Transformer: what a state holds, what a call sees of it, and what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.layers.memory_mixer import recent_inputs
from subquad.ops.memory.compressed import VisibleRows
from subquad.ops.memory.evictions import Eviction, Stand
from subquad.ops.memory.stream_layout import Example, Layout
from subquad.ops.packing import take
from subquad.ops.precision import wide_dtype
from subquad.receipt import leave_receipt
from subquad.state import State, state_dataclass


@state_dataclass
class CompressiveState(State):
    """Two memories of a stream.

    Attributes:
        length: int64 (B,).
        memory_start: int64 (B,), position of the first token of the memory.
        waiting_start: int64 (B,), position of the first token that is neither compressed nor dropped.
        rows: int64 (B,), compressed rows.
        hidden: (B, T, D), inputs of the last T valid tokens, the newest in the last column; zeros before the first.
        compressed: (B, C, D), the last C rows, likewise.
        usage: (B, T) where compression goes by usage, else (B, 0): attention received, summed over the queries of a
            segment that goes on and all heads; of tokens that wait its mean.
    """

    memory_start: Tensor
    waiting_start: Tensor
    rows: Tensor
    hidden: Tensor
    compressed: Tensor
    usage: Tensor


@dataclass(frozen=True)
class Sizes:
    """What a new state holds.

    Attributes:
        hidden: T.
        compressed: C.
        usage: columns of usage, T or 0.
        zero_tokens: attended zeros before the first token.
        zero_rows: attended rows of zeros.
    """

    hidden: int
    compressed: int
    usage: int
    zero_tokens: int
    zero_rows: int

    @property
    def stand(self) -> Stand:
        """Where a stream stands at first."""
        return Stand(0, -self.zero_tokens, -self.zero_tokens, self.zero_rows)

    def fresh(self, batch: int, width: int, device: torch.device, dtype: torch.dtype) -> CompressiveState:
        """A new state."""
        integers = (torch.full((batch,), value, dtype=torch.int64, device=device) for value in self.stand)
        shapes = ((batch, self.hidden, width), (batch, self.compressed, width), (batch, self.usage))
        numbers = (torch.zeros(shape, device=device, dtype=dtype) for shape in shapes)
        return CompressiveState(*integers, *numbers)


class Stream(NamedTuple):
    """A call and what is stored before it.

    Attributes:
        layout: columns of the call.
        hidden: stored inputs (B, T, D), of as many tokens as any example needs.
        rows: stored rows (B, C, D), likewise.
        usage: of the stored inputs (B, T), float32 or wider.
    """

    layout: Layout
    hidden: Tensor
    rows: Tensor
    usage: Tensor

    def windows(self, x: Tensor, columns: Tensor) -> Tensor:
        """Inputs by columns, int64 (B, R, W), of windows: (B, R, W, D), through which no gradient flows back."""
        tokens = torch.cat((self.hidden, x), dim=1).detach()
        return take(tokens, columns)


def begin(x: Tensor, valid: Tensor | None, sizes: Sizes, eviction: Eviction, before: CompressiveState | None) -> Stream:
    """Lay out a call of the tokens x (B, L, D), the valid ones first; `valid` is bool (B, L), in any order."""
    batch, length, width = x.shape
    added = [length] * batch if valid is None else valid.sum(dim=1).tolist()
    if before is None:
        stands = [sizes.stand] * batch
    else:
        facts = (before.length, before.memory_start, before.waiting_start, before.rows)
        stands = [Stand(*numbers) for numbers in zip(*(fact.tolist() for fact in facts), strict=True)]
    if not batch:
        stands, added = [sizes.stand], [length]
    layout = Layout.of(_examples(stands, added, eviction, keeps=before is not None), batch, length)
    if before is None:
        if sizes.compressed and not layout.made:
            _note_nothing_compressed(eviction)
        hidden, rows = (x.new_zeros(batch, count, width) for count in (layout.stored, layout.stored_rows))
        wide = wide_dtype(x)
        return Stream(layout, hidden, rows, x.new_zeros(batch, layout.stored, dtype=wide))
    hidden = before.hidden[:, before.hidden.shape[1] - layout.stored :].to(x.dtype)
    rows = before.compressed[:, before.compressed.shape[1] - layout.stored_rows :].to(x.dtype)
    return Stream(layout, hidden, rows, before.usage[:, max(0, before.usage.shape[1] - layout.stored) :])


def _note_nothing_compressed(eviction: Eviction) -> None:
    reason = "a call without a state ended before enough tokens for one row left the memory"
    if eviction.segment_length is None:
        reason = "a call without a state is one segment: carry the state from call to call, or give segment_length"
    leave_receipt("compressive", asked="compressed memory", ran="nothing compressed", reason=reason)


def _examples(stands: Sequence[Stand], added: Sequence[int], eviction: Eviction, *, keeps: bool) -> Sequence[Example]:
    """The segments of every example, or of one where all are equal."""
    known: dict[tuple[Stand, int], Example] = {}
    for stand, count in zip(stands, added, strict=True):
        if (stand, count) not in known:
            known[stand, count] = Example(stand, tuple(eviction.segments(stand, count, last=keeps)))
    if len(known) == 1:
        return list(known.values())
    return [known[key] for key in zip(stands, added, strict=True)]


def note_untaught(stream: Stream, sight: VisibleRows) -> None:
    """Leave a receipt for a call that sees rows, all of them made before and cut off from f_c."""
    stored = stream.layout.stored_rows
    if stored and not stream.rows.requires_grad and int(sight.stop.max()) <= stored:
        leave_receipt(
            "compressive",
            asked="loss='bptt'",
            ran="no gradient of the compression",
            reason="no token of this call sees a row made in it; calls must be longer, or segment_length smaller",
        )


def next_state(
    before: CompressiveState, x: Tensor, rows: Tensor, usage: Tensor, layout: Layout, segment_length: int | None
) -> CompressiveState:
    """The state after a call.

    Args:
        before: the state before.
        x: the tokens of the call (B, L, D), the valid ones first.
        rows: rows that the call made (B, R, D).
        usage: of the stored tokens and those of the call (B, T + L).
        layout: of the call.
        segment_length: N; None where every call is a segment.
    """
    examples = [layout.examples[b % len(layout.examples)] for b in range(layout.batch)]
    stands = torch.tensor([example.after for example in examples], dtype=torch.int64, device=x.device).view(-1, 4)
    length, memory, waiting, count = stands.unbind(dim=1)
    added = length - before.length
    unfinished = None if segment_length is None else length % segment_length
    hidden = recent_inputs(before.hidden, x, added, unfinished)
    capacity, kept = before.compressed.shape[1], before.usage.shape[1]
    made = torch.tensor([example.made for example in examples], dtype=torch.int64, device=x.device)
    columns = made[:, None] + torch.arange(capacity, device=x.device)
    joined = torch.cat((before.compressed, rows.to(before.compressed.dtype)), dim=1)
    compressed = take(joined, columns)
    columns = added[:, None] + torch.arange(kept, device=x.device)
    used = torch.cat((before.usage[:, : max(0, kept - layout.stored)], usage.to(before.usage.dtype)), dim=1)
    after_usage = take(used, columns) if kept else before.usage
    return CompressiveState(length, memory, waiting, count.clamp_max(capacity), hidden, compressed, after_usage)
