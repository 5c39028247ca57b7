"""Taking padding out of a sequence, putting it back, and growing a store of tokens."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from subquad.mask import Mask
from subquad.ops.packing import Packing, append, has_gaps, take, valid_first


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3))
def test_valid_tokens_come_first_in_their_order_and_go_back(rows: list[list[bool]]) -> None:
    valid = torch.tensor(rows)
    order = valid_first(valid)
    assert torch.equal(take(valid, order), valid.sort(dim=1, descending=True, stable=True).values)
    places = torch.arange(6).expand_as(valid)
    for row, taken, count in zip(valid, take(places, order), valid.sum(dim=1).tolist(), strict=True):
        assert taken[:count].tolist() == row.nonzero()[:, 0].tolist()
    packing = Packing(valid)
    assert packing.valid is not None
    assert torch.equal(packing.valid, take(valid, order))
    for shape in ((6,), (6, 3), (2, 6, 3)):
        x = torch.randn(len(rows), *shape)
        assert torch.equal(packing.pack(x), take(x, order))
        assert torch.equal(packing.unpack(packing.pack(x)), x)


def test_segments_of_tokens_at_the_end_follow_the_last_valid_one() -> None:
    valid, segments = torch.tensor([[False, True, False, True]]), torch.tensor([[0, 1, 1, 2]])
    packed = Packing(valid).pack_mask(Mask(valid, segments))
    assert packed.valid is not None
    assert packed.segments is not None
    assert packed.valid.tolist() == [[True, True, False, False]]
    assert packed.segments.tolist() == [[1, 2, 2, 2]]


def test_nothing_moves_where_the_valid_tokens_are_first_already() -> None:
    x = torch.randn(1, 3, 2)
    for valid in (None, torch.tensor([[True, True, False]])):
        packing, mask = Packing(valid), Mask(valid)
        assert packing.pack(x) is packing.unpack(x) is x
        assert packing.pack_mask(mask) is mask
        assert packing.valid is valid


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=3))
def test_only_an_invalid_token_before_a_valid_one_is_a_gap(rows: list[list[bool]]) -> None:
    assert has_gaps(torch.tensor(rows)) == any(sorted(row, reverse=True) != row for row in rows)


def test_take_may_repeat_and_leave_out_tokens() -> None:
    x = torch.randn(1, 2, 4, 3)
    assert torch.equal(take(x, torch.tensor([[3, 3, 0]])), x[:, :, [3, 3, 0]])


def test_new_tokens_are_written_behind_the_stored_ones_of_each_row() -> None:
    stored = torch.tensor([[1, 2, 3], [4, 0, 0]])
    columns = torch.tensor([[3, 9], [1, 2]])
    grown = append(stored, torch.tensor([[5, 6], [7, 8]]), columns, 4)
    assert grown.tolist() == [[1, 2, 3, 5], [4, 7, 8, 0]]
    assert stored.tolist() == [[1, 2, 3], [4, 0, 0]]


def test_heads_are_appended_like_ids_and_pass_gradients() -> None:
    stored = torch.randn(2, 3, 1, 4, requires_grad=True)
    new = torch.randn(2, 3, 2, 4, requires_grad=True)
    grown = append(stored, new, torch.tensor([[1, 2], [2, 1]]), 3)
    assert torch.equal(grown[0], torch.cat((stored[0], new[0]), dim=1))
    assert torch.equal(grown[1], torch.cat((stored[1], new[1].flip(1)), dim=1))
    grown.sum().backward()
    assert stored.grad is not None
    assert new.grad is not None
    assert bool((stored.grad == 1).all())
    assert bool((new.grad == 1).all())
