"""What leaves a memory, and when: against lists that are shifted token by token."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad.ops.memory.evictions import Eviction, Segment, Stand, tally

SIZES = {"memory": st.integers(0, 6), "rate": st.integers(1, 4), "overlap": st.integers(0, 2), "carry": st.booleans()}
CALLS = st.lists(st.integers(0, 9), min_size=1, max_size=6)


def walk(eviction: Eviction, calls: list[int]) -> list[Segment]:
    stand, found = Stand(), []
    for added in calls:
        segments = list(eviction.segments(stand, added, last=True))
        found += segments
        stand = segments[-1].after if segments else stand
    return found


@given(calls=CALLS, segment=st.one_of(st.none(), st.integers(1, 5)), **SIZES)
def test_memory_and_rows_are_those_of_a_queue(
    calls: list[int], segment: int | None, memory: int, rate: int, overlap: int, carry: bool
) -> None:
    eviction = Eviction(memory, segment, rate, rate + overlap, carry)
    queue: deque[int] = deque()
    waiting: list[int] = []
    rows: list[list[int]] = []
    for found in walk(eviction, calls):
        assert list(range(found.before.memory, found.own)) == list(queue)
        assert found.before.rows == len(rows)
        assert found.after.length == found.stop
        if not found.ends:
            continue
        queue.extend(range(found.own, found.stop))
        while len(queue) > memory:
            waiting.append(queue.popleft())
        made = [waiting[s : s + rate + overlap] for s in range(0, len(waiting) - rate - overlap + 1, rate)]
        if made:
            assert found.run is not None
            assert (found.run.first, found.run.rows) == (waiting[0], len(made))
            used = made[-1][-1] if carry else waiting[-1]
            assert found.run.tokens == used - waiting[0] + 1
            waiting = waiting[len(made) * rate :] if carry else []
        else:
            assert found.run is None
        rows += made
        assert len(waiting) < rate + overlap
        if waiting:
            assert found.after.waiting == waiting[0]


@given(calls=CALLS, segment=st.integers(1, 5), **SIZES)
def test_the_segments_of_a_stream_do_not_depend_on_its_calls(
    calls: list[int], segment: int, memory: int, rate: int, overlap: int, carry: bool
) -> None:
    eviction = Eviction(memory, segment, rate, rate + overlap, carry)
    cut, whole = ([s for s in walk(eviction, parts) if s.ends] for parts in (calls, [sum(calls)]))
    assert [(s.own, s.before[1:], s.after, s.run) for s in cut] == [
        (s.own, s.before[1:], s.after, s.run) for s in whole
    ]


def test_what_nobody_will_read_is_not_compressed() -> None:
    eviction = Eviction(2, 4, 2, 2, carry=False)
    last = [segment.run is not None for segment in eviction.segments(Stand(), 8, last=False)]
    assert last == [True, False]
    assert all(segment.run for segment in eviction.segments(Stand(), 8, last=True))


def test_zeros_before_the_stream_leave_first() -> None:
    (first, second) = Eviction(4, 3, 3, 3, carry=False).segments(Stand(0, -4, -4, 5), 6, last=True)
    assert first.run is not None
    assert second.run is not None
    assert (first.run.first, first.run.tokens, second.run.first) == (-4, 3, -1)


@pytest.mark.parametrize("true_step", [None, 2])
@given(length=st.integers(0, 30), segment=st.integers(1, 7), memory=st.integers(0, 6), most=st.integers(0, 5))
def test_a_tally_counts_pairs_and_their_largest_distances(
    true_step: int | None, length: int, segment: int, memory: int, most: int
) -> None:
    segments = list(Eviction(memory, segment, 2, 2, carry=False).segments(Stand(), length, last=False))
    distances, row_distances = [], []
    for part in segments:
        for i in range(part.first, part.stop):
            distances += [i - j for j in range(part.before.memory, i + 1)]
            start = part.own if true_step is None else part.before.waiting
            row_distances += [i - start + (true_step or 1) * m for m in range(1, min(part.before.rows, most) + 1)]
    found = tally(segments, most, true_step)
    assert (found.pairs, found.row_pairs) == (len(distances), len(row_distances))
    assert (found.farthest, found.farthest_row) == (max(distances, default=0), max(row_distances, default=0))
    assert found.rows == sum(run[2] for run in found.runs) == (segments[-1].after.rows if segments else 0)
