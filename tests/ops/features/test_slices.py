"""Slices: their heads and tokens are all there are, and their temporaries lie in the same memory."""

from __future__ import annotations

import pytest
import torch

from subquad.ops.features.slices import SLICE_NUMBERS, SLICE_TOKENS, Workspace, head_groups, token_slices


@pytest.mark.parametrize(
    ("batch", "heads", "length", "features"), [(3, 8, 64, 512), (2, 6, 4096, 64), (1, 2, 9000, 256)]
)
def test_slices_hold_every_token_of_every_head_once(batch: int, heads: int, length: int, features: int) -> None:
    seen = torch.zeros(batch, heads, length, dtype=torch.int8)
    for group in head_groups(seen, features):
        for tokens in token_slices(length):
            part = seen[(*group, tokens)]
            assert part.shape[:2].numel() == 1 or part.numel() * features <= SLICE_NUMBERS
            assert part.shape[2] <= SLICE_TOKENS
            part += 1
    assert bool((seen == 1).all())


def test_temporaries_of_one_name_share_memory_and_those_of_two_do_not() -> None:
    room = Workspace(torch.empty(0), torch.float64)
    first, smaller, other = room.of("a", 4, 8), room.of("a", 3, 2), room.of("b", 4, 8)
    assert smaller.shape == (3, 2)
    assert smaller.dtype == torch.float64
    assert smaller.data_ptr() == first.data_ptr() != other.data_ptr()
    assert room.of("a", 5, 8).shape == (5, 8)
