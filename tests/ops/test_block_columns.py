"""Tokens get the columns that a loop gives them, one after the other."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from subquad.ops.block_columns import block_columns


def columns_by_loop(valid: list[bool], segments: list[int], size: int, last_segment: int, place: int) -> list[int]:
    """Columns of the valid tokens, counted from the first free one, which stands at `place` in its block."""
    found, free, document, filled = [], 0, last_segment, place
    for real, segment in zip(valid, segments, strict=True):
        if not real:
            continue
        if segment != document:
            free, filled, document = free + -filled % size, 0, segment
        found.append(free)
        free, filled = free + 1, filled + 1
    return found


@given(length=st.integers(1, 12), size=st.sampled_from([1, 2, 3, 5]), data=st.data())
def test_columns_are_those_of_a_loop(length: int, size: int, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, length), min_size=3, max_size=3))
    valid = torch.arange(length) < torch.tensor(counts)[:, None]
    segments = torch.randint(0, 2, (3, length)).cumsum(dim=1)
    last, place = torch.randint(0, 2, (3,)), torch.randint(0, size, (3,))
    placed = block_columns(valid, segments, size, last_segment=last, place=place)
    behind, document = placed.end()
    for row in range(3):
        expected = columns_by_loop(valid[row].tolist(), segments[row].tolist(), size, int(last[row]), int(place[row]))
        assert placed.columns[row, valid[row]].tolist() == expected
        assert int(behind[row]) == max((column + 1 for column in expected), default=0)
        kept = torch.cat((last[row : row + 1], segments[row, valid[row]]))
        assert int(document[row]) == int((kept.diff() != 0).sum())
    assert placed.width == max(1, int(behind.max()))


def test_one_document_takes_one_column_after_the_other() -> None:
    valid = torch.tensor([[True, True, False], [True, True, True]])
    nothing = torch.zeros(2, dtype=torch.int64)
    placed = block_columns(valid, None, 4, last_segment=nothing, place=nothing)
    assert placed.columns.tolist() == [[0, 1, 2]] * 2
    assert placed.end()[0].tolist() == [2, 3]


def test_what_is_spread_can_be_collected_again() -> None:
    segments = torch.tensor([[0, 0, 1, 2], [5, 6, 6, 6]])
    valid = torch.tensor([[True] * 4, [True, True, True, False]])
    nothing = torch.zeros(2, dtype=torch.int64)
    placed = block_columns(valid, segments, 3, last_segment=segments[:, 0], place=nothing)
    x = torch.randn(2, 1, 4, 2)
    spread = placed.spread(x)
    assert spread.shape == (2, 1, 7, 2)
    assert torch.equal(spread[0, :, [0, 1, 3, 6]], x[0])
    assert not spread[0, :, [2, 4, 5]].any()
    assert torch.equal(placed.collect(spread).transpose(1, 2)[valid], x.transpose(1, 2)[valid])
    assert placed.spread(valid).sum(dim=1).tolist() == [4, 3]
