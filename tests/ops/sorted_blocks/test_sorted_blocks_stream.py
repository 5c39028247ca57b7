"""Tokens that arrive among the blocks of a stream: which blocks begin, what describes them, and what is stored."""

from __future__ import annotations

import torch

from subquad.ops.sorted_blocks.sorting import block_descriptors
from subquad.ops.sorted_blocks.stream import Arrivals, sort_blocks

ARRIVALS = Arrivals(start=torch.tensor([4, 3]), end=torch.tensor([9, 5]), tokens=5, block=3)
"""Blocks 0 and 1 are open or whole in the first example, block 0 in the second, which gets two valid tokens."""


def test_blocks_are_counted_as_they_open() -> None:
    assert ARRIVALS.first.tolist() == [2, 1]
    assert ARRIVALS.opened.tolist() == [3, 2]
    assert ARRIVALS.capacity == 3
    assert ARRIVALS.new_blocks().tolist() == [[2, 3], [1, 2]]  # of which one each has a token


def test_new_blocks_are_described_as_in_one_call() -> None:
    x = torch.randn(1, 9, 2, dtype=torch.float64)
    expected = block_descriptors(x, 3, causal=True)
    arrivals = Arrivals(torch.tensor([2]), torch.tensor([9]), tokens=7, block=3)
    found = arrivals.descriptors(x[:, :2].sum(dim=1), x[:, 2:])
    torch.testing.assert_close(found, expected[:, 1:], rtol=1e-12, atol=1e-12)


def test_tokens_are_stored_behind_each_other_and_invalid_ones_not() -> None:
    stored = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 0]])[:, None, :, None]
    new = torch.tensor([[5.0, 6, 7, 8, 9], [4, 5, 99, 99, 99]])[:, None, :, None]
    blocks = ARRIVALS.join(stored, new)
    assert blocks.shape == (2, 1, 3, 3, 1)
    assert blocks.flatten(1).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 0, 0, 0, 0]]


def test_blocks_are_sorted_by_rows_and_place_0_gets_the_null_token() -> None:
    blocks = torch.arange(6.0).view(1, 1, 3, 2, 1)
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]])[None, None]
    found = sort_blocks(rows, torch.tensor([[0, 1, 2]]), blocks, torch.tensor([[7.0]]))
    assert found.flatten(2).tolist() == [[[7, 7, 0, 1, 1, 2]]]
