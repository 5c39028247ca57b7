"""Where the tokens and compressed rows of a call stand: from positions in streams to columns of tensors.

Tokens that are stored stand before those of the call: with T of them, the token at position p of a stream that had
`length` tokens before the call is in column T + p - length. Likewise rows: the stored ones, then those of the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.memory.attention import VisibleColumns
from subquad.ops.memory.compressed import VisibleRows
from subquad.ops.memory.evictions import Run, Segment, Stand


class Example(NamedTuple):
    """A stream and the segments of a call.

    Attributes:
        stand: where the stream stood before the call.
        segments: what the call holds, in order.
    """

    stand: Stand
    segments: tuple[Segment, ...]

    @property
    def after(self) -> Stand:
        """Where it stands after the call."""
        return self.segments[-1].after if self.segments else self.stand

    @property
    def made(self) -> int:
        """Rows that the call makes."""
        return self.after.rows - self.stand.rows


class Compressed(NamedTuple):
    """A run of the call.

    Attributes:
        example: whose.
        segment: at the end of which it was compressed.
        run: its tokens.
        offset: its first row among those that the call makes of this example.
    """

    example: int
    segment: Segment
    run: Run
    offset: int


class Layout(NamedTuple):
    """The columns of a call.

    Attributes:
        examples: all of them, or one for all where they are equal.
        batch: B.
        length: L, tokens of the call, the valid ones first.
        stored: T, stored tokens that any example needs.
        stored_rows: stored rows, likewise.
    """

    examples: Sequence[Example]
    batch: int
    length: int
    stored: int
    stored_rows: int

    @classmethod
    def of(cls, examples: Sequence[Example], batch: int, length: int) -> Layout:
        """With as much stored as any example needs."""
        stands = [example.stand for example in examples]
        stored, rows = max(stand.length - stand.waiting for stand in stands), max(stand.rows for stand in stands)
        return cls(examples, batch, length, stored, rows)

    @property
    def made(self) -> int:
        """Columns of rows that the call makes, of which an example may fill less."""
        return max(example.made for example in self.examples)

    @property
    def unfinished(self) -> int:
        """Stored tokens of segments whose end the call holds, the most of any example."""
        ended = ((item.segment.first, item.segment.own) for item in self.runs())
        return max((first - own for first, own in ended), default=0)

    def column(self, example: Example, position: int) -> int:
        """The column of a token."""
        return self.stored + position - example.stand.length

    def column_of(self, item: Compressed, position: int) -> int:
        """The column of a token of the example that a run belongs to."""
        return self.column(self.examples[item.example % len(self.examples)], position)

    def runs(self) -> Iterator[Compressed]:
        """All runs of all examples."""
        for b in range(self.batch):
            example = self.examples[b % len(self.examples)]
            for segment in example.segments:
                if segment.run is not None:
                    yield Compressed(b, segment, segment.run, segment.before.rows - example.stand.rows)

    def facts(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For every token the columns where its segment, its memory and what waits begin, and where its rows end.

        Each is int64 (B or 1, L).
        Padding behind the tokens sees what the last token sees.
        """
        tables = []
        for example in self.examples:
            stand, segments = example.stand, example.segments
            columns = [stand.length, stand.memory, stand.waiting, stand.rows]
            starts = [[s.own, s.before.memory, s.before.waiting, s.before.rows] for s in segments] or [columns]
            sizes = [s.stop - s.first for s in segments] or [0]
            sizes[-1] += self.length - sum(sizes)
            shift = torch.tensor([*[self.stored - stand.length] * 3, self.stored_rows - stand.rows])
            tables.append((torch.tensor(starts) + shift).repeat_interleave(torch.tensor(sizes), dim=0))
        own, memory, waiting, rows = torch.stack(tables).to(device).unbind(dim=-1)
        return own, memory, waiting, rows

    def reach(self, device: torch.device) -> VisibleColumns:
        """What every token sees of tokens."""
        own, memory, _, _ = self.facts(device)
        return VisibleColumns(memory.clamp_min(0), own.clamp_min(0))

    def sight(self, device: torch.device, most: int, true_step: int | None) -> VisibleRows:
        """What every token sees of rows.

        Args:
            device: of the result.
            most: rows that are kept.
            true_step: distance between rows where distances are those of tokens, the first that waits being one behind
                the rows; None where rows count as if they stood right before the segment.
        """
        own, _, waiting, stop = self.facts(device)
        rows = torch.tensor([[example.stand.rows] for example in self.examples], device=device)
        first = stop - torch.minimum(stop - self.stored_rows + rows, torch.tensor(most, device=device))
        columns = self.stored + torch.arange(self.length, device=device)
        if true_step is None:
            return VisibleRows(first, stop, columns - own, 1)
        return VisibleRows(first, stop, columns - waiting, true_step)

    def windows(self, rate: int, window: int, device: torch.device) -> Tensor:
        """The columns of every window, int64 (B, R, window); 0 for rows that an example doesn't make."""
        tables = []
        for example in self.examples:
            runs = [segment.run for segment in example.segments if segment.run is not None]
            starts = [self.column(example, run.first) + r * rate for run in runs for r in range(run.rows)]
            first = torch.tensor(starts + [0] * (self.made - len(starts)), dtype=torch.int64)
            table = first[:, None] + torch.arange(window)
            table[len(starts) :] = 0
            tables.append(table)
        return torch.stack(tables).to(device).expand(self.batch, -1, -1)
