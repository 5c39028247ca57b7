"""When tokens leave the memory of a stream, and which of them are compressed together: whole numbers alone.

At the end of a segment the memory keeps the newest M tokens. Those before them form a run, of which every `rate` tokens
begin a window, and every window that is full becomes a row. A run too short for a window waits for the next one. What
is left behind the last window is dropped, or carried into the next run.

Positions count the tokens of a stream from 0; attended zeros before the first token have negative ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Stand(NamedTuple):
    """Where a stream stands.

    Attributes:
        length: tokens so far, which is the position of the next one.
        memory: position of the first token of the memory.
        waiting: position of the first token that is neither compressed nor dropped; up to the memory, such tokens wait.
        rows: rows made so far.
    """

    length: int = 0
    memory: int = 0
    waiting: int = 0
    rows: int = 0


class Run(NamedTuple):
    """Tokens that are compressed together.

    Attributes:
        first: position of the first one.
        tokens: how many are compressed or dropped.
        rows: how many rows they become, at least one.
    """

    first: int
    tokens: int
    rows: int


class Segment(NamedTuple):
    """What a call holds of one segment.

    Attributes:
        own: position of the segment's first token, which an earlier call may hold.
        first: position of the first token that the call holds.
        stop: position behind the last one.
        before: where the stream stands when the segment begins, but for its length: what its tokens see.
        after: where it stands behind `stop`; the same memory where the segment goes on.
        run: what is compressed at the end of the segment; None for nothing.
        ends: whether the segment ends here and memory is to move on.
    """

    own: int
    first: int
    stop: int
    before: Stand
    after: Stand
    run: Run | None
    ends: bool


@dataclass(frozen=True)
class Eviction:
    """The rule.

    Attributes:
        memory_length: M.
        segment_length: N; None where every call is a segment.
        rate: tokens from one window to the next.
        window: tokens of a window, at least `rate`.
        carry: whether what is left of a run is carried into the next one.
    """

    memory_length: int
    segment_length: int | None
    rate: int
    window: int
    carry: bool

    def segments(self, stand: Stand, added: int, *, last: bool) -> Iterator[Segment]:
        """The segments of a call of `added` tokens.

        Args:
            stand: where the stream stands before.
            added: number of tokens.
            last: whether memory moves on at the end of the call too, as it must where the stream goes on.
        """
        end, position = stand.length + added, stand.length
        while position < end:
            own = position if self.segment_length is None else position - position % self.segment_length
            stop = end if self.segment_length is None else min(own + self.segment_length, end)
            ends = (self.segment_length is None or stop == own + self.segment_length) and (last or stop < end)
            after, run = self._move(stand, stop) if ends else (stand._replace(length=stop), None)
            yield Segment(own, position, stop, stand, after, run, ends)
            stand, position = after, stop

    def _move(self, stand: Stand, stop: int) -> tuple[Stand, Run | None]:
        """The memory at the end of a segment, and what leaves it."""
        memory = max(stand.memory, stop - self.memory_length)
        length = memory - stand.waiting
        rows = (length - (self.window - self.rate)) // self.rate if length >= self.window else 0
        if not rows:
            return Stand(stop, memory, stand.waiting, stand.rows), None
        waiting = stand.waiting + rows * self.rate if self.carry else memory
        used = (rows - 1) * self.rate + self.window if self.carry else length
        return Stand(stop, memory, waiting, stand.rows + rows), Run(stand.waiting, used, rows)


class Tally(NamedTuple):
    """What the segments of a call see and make.

    Attributes:
        pairs: pairs of a token and a visible token.
        farthest: largest distance among them.
        row_pairs: pairs of a token and a visible row.
        farthest_row: largest distance among those.
        rows: rows made.
        runs: of every run the tokens of its segment, its own tokens and its rows.
    """

    pairs: int
    farthest: int
    row_pairs: int
    farthest_row: int
    rows: int
    runs: tuple[tuple[int, int, int], ...]


def tally(segments: Iterable[Segment], most: int, true_step: int | None) -> Tally:
    """Count.

    Args:
        segments: of a call.
        most: rows that are kept.
        true_step: as in `Layout.sight`.
    """
    pairs, farthest, row_pairs, farthest_row, rows, runs = 0, 0, 0, 0, 0, []
    for segment in segments:
        size, before = segment.stop - segment.first, segment.before
        pairs += size * (segment.first - before.memory) + size * (size + 1) // 2
        farthest = max(farthest, segment.stop - 1 - before.memory)
        seen = min(before.rows, most)
        row_pairs += size * seen
        start, step = (segment.own, 1) if true_step is None else (before.waiting, true_step)
        farthest_row = max(farthest_row, segment.stop - 1 - start + step * seen) if seen else farthest_row
        if segment.run is not None:
            rows += segment.run.rows
            runs.append((segment.stop - segment.own, segment.run.tokens, segment.run.rows))
    return Tally(pairs, farthest, row_pairs, farthest_row, rows, tuple(runs))
