"""The tournament finds the largest entries of every row."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from subquad.ops.topk.largest import largest, largest_by_topk


@given(
    width=st.sampled_from([1, 2, 9, 64, 131, 1000, 4099]),
    share=st.floats(0, 1),
    rows=st.integers(0, 3),
    integer=st.booleans(),
)
def test_the_largest_entries_are_found(width: int, share: float, rows: int, integer: bool) -> None:
    count = max(1, round(share * min(width, 50)))
    scores = torch.randn(rows, width, dtype=torch.float64)
    scores = (3 * scores).round() if integer else scores
    scores[torch.rand(rows, width) < 0.3] = -torch.inf
    values, columns = largest(scores, count)
    assert torch.equal(values, largest_by_topk(scores, count)[0])
    assert torch.equal(scores.gather(1, columns), values)
    assert all(len(set(row)) == count for row in columns.tolist())
