"""Compression by usage: of the tokens that leave the memory, those that got most attention are kept.

    usage_j = mean over the heads and the queries of a segment of P_ij

The segment is the last one in which token j was part of segment or memory. Equal usage: the older token. What is kept
after a segment changes what the next segment attends to, so segments come one after the other, those of all examples
side by side. Nothing of this has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.memory.attention import Distances, Slice, VisibleColumns, slice_scores, slices
from subquad.ops.memory.compressed import CompressedRows, RowSlice, VisibleRows, row_scores, row_slice
from subquad.ops.memory.evictions import Segment
from subquad.ops.memory.stream_layout import Example, Layout
from subquad.ops.packing import take
from subquad.ops.precision import full_precision, wide_dtype


class Scored(NamedTuple):
    """What is attended with.

    Attributes:
        q: (B, H, L, E), of the call.
        k: (B, H, T + L, E), of stored tokens and those of the call.
        row_k: (B, H, R', E), of stored rows.
        distances: of tokens.
        row_distances: of rows; None where none is seen.
        sight: what every token of the call sees of rows.
    """

    q: Tensor
    k: Tensor
    row_k: Tensor
    distances: Distances
    row_distances: Distances | None
    sight: VisibleRows


def received_attention(
    q: Tensor, k: Tensor, distances: Distances, reach: VisibleColumns, rows: CompressedRows | None, counted: Tensor
) -> Tensor:
    """The attention that tokens get, summed over heads and queries.

    Args:
        q: (B, H, L, E).
        k: (B, H, S, E).
        distances: of tokens.
        reach: what each query sees of tokens.
        rows: takes a share of the attention; None for none.
        counted: bool (B, L), queries that count.

    Returns:
        (B, S), float32 or wider.
    """
    wide = wide_dtype(q)
    received = q.new_zeros(q.shape[0], k.shape[2], dtype=wide)
    distances = Distances(*(tensor.to(wide) for tensor in distances))
    for part in slices(q, k, distances.vectors.shape[1], reach):
        part_q = q[:, :, part.rows].to(wide)
        of_rows = None if rows is None else row_slice(rows, part.rows)
        weights = slice_weights(part_q, k[:, :, part.columns].to(wide), distances, part, rows, of_rows)
        received[:, part.columns] += (weights * counted[:, None, part.rows, None]).sum(dim=(1, 2))
    return received


def slice_weights(
    q: Tensor, k: Tensor, distances: Distances, part: Slice, rows: CompressedRows | None, of_rows: RowSlice | None
) -> Tensor:
    """The attention that a slice of queries gives to tokens, (B, H, rows, columns)."""
    scores = slice_scores(q, k, distances, part)
    total = scores.logsumexp(dim=-1)
    if rows is not None and of_rows is not None:
        vectors, u, w = rows.distances
        near = Distances(vectors[:, of_rows.vectors], u, w)
        others = row_scores(q, rows.k[:, :, of_rows.rows], near, of_rows).masked_fill(~of_rows.visible, -math.inf)
        total = torch.logaddexp(total, others.logsumexp(dim=-1))
    return (scores - total[..., None]).exp()


@torch.no_grad()
def most_used(given: Scored, layout: Layout, usage: Tensor) -> tuple[Tensor, Tensor]:
    """Choose tokens, and say how much each was used.

    Args:
        given: what is attended with.
        layout: of the call.
        usage: (B, T), of stored tokens: of those that wait their usage, of others what they got so far in a segment
            that goes on, summed over heads and queries.

    Returns:
        Columns of the tokens that become rows, int64 (B, R, 1), 0 where an example makes less; and usage (B, T + L).
    """
    batch, length = layout.batch, layout.length
    examples = [layout.examples[b % len(layout.examples)] for b in range(batch)]
    received = torch.cat((usage, usage.new_zeros(batch, length)), dim=1)
    chosen = torch.zeros(batch, layout.made, dtype=torch.int64, device=usage.device)
    room = given.k.new_zeros(*given.k.shape[:2], layout.made, given.k.shape[3])
    row_k = torch.cat((given.row_k, room), dim=2)
    with full_precision(usage.device):
        for wave in range(max((len(example.segments) for example in examples), default=0)):
            active = [(b, example) for b, example in enumerate(examples) if wave < len(example.segments)]
            _add_wave(received, given._replace(row_k=row_k), layout, active, wave)
            for b, example in active:
                if not example.segments[wave].ends:
                    continue
                kept, rows = _settle(received[b], layout, example, example.segments[wave], given.q.shape[1])
                chosen[b, rows] = kept
                row_k[b, :, layout.stored_rows + rows.start : layout.stored_rows + rows.stop] = given.k[b, :, kept]
    return chosen[..., None], received


def _add_wave(
    received: Tensor, given: Scored, layout: Layout, active: Sequence[tuple[int, Example]], wave: int
) -> None:
    """Add what the queries of one segment of every example give, the segments moved so that all end together."""
    device, segments = received.device, [example.segments[wave] for _, example in active]
    b = torch.tensor([row for row, _ in active], device=device)
    span = max(segment.stop - segment.before.memory for segment in segments)
    count = max(segment.stop - segment.first for segment in segments)
    ends = [layout.column(example, example.segments[wave].stop) for _, example in active]
    sizes = [[s.stop - s.before.memory, s.stop - s.first] for s in segments]
    held, queries = torch.tensor(sizes, device=device).unbind(dim=1)
    columns = torch.tensor(ends, device=device)[:, None] - span + torch.arange(span, device=device)
    index = columns.clamp_min(0)
    q_index = (columns[:, span - count :] - layout.stored).clamp_min(0)
    own = torch.arange(span - count, span, device=device)
    first = torch.minimum((span - held)[:, None], own)
    rows = None
    if given.row_distances is not None:
        first_row, stop_row, ahead = (take(fact.expand(layout.batch, -1)[b], q_index) for fact in given.sight[:3])
        sight = VisibleRows(first_row, stop_row, ahead, given.sight.step)
        rows = CompressedRows(given.row_k[b], given.row_k[b], given.row_distances, sight)
    counted = own >= (span - queries)[:, None]
    found = received_attention(
        take(given.q[b], q_index), take(given.k[b], index), given.distances, VisibleColumns(first, first), rows, counted
    )
    received.index_put_((b[:, None], index), found.to(received.dtype), accumulate=True)


def _settle(
    received: Tensor, layout: Layout, example: Example, segment: Segment, num_heads: int
) -> tuple[Tensor, slice]:
    """End a segment of an example: usage (S,) of what leaves the memory; the columns that are kept, and their rows."""
    leaves, stays, stop = (
        layout.column(example, position) for position in (segment.before.memory, segment.after.memory, segment.stop)
    )
    received[leaves:stays] /= num_heads * (segment.stop - segment.own)
    received[stays:stop] = 0
    run, offset = segment.run, segment.before.rows - example.stand.rows
    if run is None:
        return torch.zeros(0, dtype=torch.int64, device=received.device), slice(offset, offset)
    start = layout.column(example, run.first)
    order = received[start : start + run.tokens].argsort(descending=True, stable=True)
    return start + order[: run.rows].sort().values, slice(offset, offset + run.rows)
