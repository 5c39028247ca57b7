"""The mask: facts about tokens, checked early, and positions that padding doesn't take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subquad import Mask
from subquad.mask import continue_segments, token_positions

CPU = torch.device("cpu")


def test_lengths_make_right_padding() -> None:
    valid = Mask.from_lengths([3, 0, 2], 3).valid
    assert valid is not None
    assert valid.tolist() == [[True] * 3, [False] * 3, [True, True, False]]
    same = Mask.from_lengths(torch.tensor([3, 0, 2]), 3).valid
    assert same is not None
    assert torch.equal(valid, same)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([4], r"lengths must lie in 0\.\.3, got \[4\]"),
        ([-1], r"lengths must lie in 0\.\.3, got \[-1\]"),
        ([1.5], "lengths must be one-dimensional integers, got shape"),
        ([[1]], "lengths must be one-dimensional integers, got shape"),
        ([True], "lengths must be one-dimensional integers, got shape .* torch.bool"),
    ],
)
def test_lengths_that_are_none_are_refused(lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mask.from_lengths(lengths, 3)


KEPT = torch.ones(2, 9, dtype=torch.bool)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"valid": KEPT.float()}, r"Mask: valid must be bool \(True = keep\), got torch.float32; write \(valid != 0\)"),
        ({"valid": KEPT.long()}, r"Mask: valid must be bool \(True = keep\), got torch.int64; write \(valid != 0\)"),
        ({"segments": KEPT.float()}, r"Mask: segments must hold integers, got torch.float32"),
        ({"segments": KEPT}, r"Mask: segments must hold integers, got torch.bool"),
        ({"global_tokens": KEPT.float()}, r"Mask: global_tokens must be bool .* write \(global_tokens != 0\)"),
        ({"valid": [[True, False]]}, r"Mask: valid must be a tensor \(B, L\), got list"),
        ({"valid": KEPT[0]}, r"Mask: valid must have shape \(B, L\), got \(9,\)"),
        (
            {"valid": KEPT, "segments": torch.zeros(2, 8).long()},
            r"segments is \(2, 8\) on cpu but valid is \(2, 9\) on cpu",
        ),
        (
            {"segments": KEPT.long(), "global_tokens": KEPT.to("meta")},
            r"global_tokens is \(2, 9\) on meta but segments",
        ),
    ],
)
def test_a_wrong_field_is_refused_when_the_mask_is_made(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mask(**fields)


def test_all_facts_are_changed_alike() -> None:
    marked = torch.tensor([[True, False, True]])
    mask = Mask(marked, torch.tensor([[0, 0, 1]]), ~marked).map(lambda fact: fact[:, 1:])
    assert mask.valid is not None
    assert mask.segments is not None
    assert mask.global_tokens is not None
    assert [fact.tolist() for fact in (mask.valid, mask.segments, mask.global_tokens)] == [
        [[False, True]],
        [[0, 1]],
        [[True, False]],
    ]
    assert Mask().map(lambda fact: fact[:, 1:]) == Mask()


def test_what_invalid_tokens_hold_is_cut_off_with_its_gradient() -> None:
    x = torch.tensor([[[1.0], [float("nan")], [float("inf")]]], requires_grad=True)
    kept = Mask(valid=torch.tensor([[True, False, False]])).zero_invalid(x)
    assert kept.tolist() == [[[1.0], [0.0], [0.0]]]
    kept.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[[1.0], [0.0], [0.0]]]
    assert Mask().zero_invalid(x) is x


@st.composite
def facts(draw: st.DrawFn) -> Mask:
    length = draw(st.integers(1, 8))
    valid = torch.tensor([draw(st.lists(st.booleans(), min_size=length, max_size=length))])
    steps = draw(st.lists(st.integers(0, 2), min_size=length, max_size=length))
    segments = (torch.tensor([steps]).cumsum(dim=1) - 3) if draw(st.booleans()) else None
    return Mask(valid if draw(st.booleans()) else None, segments)


@given(facts())
def test_a_position_is_the_rank_among_the_valid_tokens_of_the_segment(mask: Mask) -> None:
    some = mask.valid if mask.valid is not None else mask.segments
    length = 5 if some is None else some.shape[1]
    positions = token_positions(mask, 1, length, device=CPU)[0].tolist()
    valid = [True] * length if mask.valid is None else mask.valid[0].tolist()
    segments = [0] * length if mask.segments is None else mask.segments[0].tolist()
    for i in range(length):
        if valid[i]:
            assert positions[i] == sum(valid[j] and segments[j] == segments[i] for j in range(i))
        assert positions[i] >= 0


def test_positions_of_a_stream_go_on_where_each_row_stands() -> None:
    mask = Mask(valid=torch.tensor([[True, False, True], [True, True, True]]))
    positions = token_positions(mask, 2, 3, device=CPU, start=torch.tensor([10, 0]))
    assert positions.tolist() == [[10, 10, 11], [0, 1, 2]]


def test_segments_of_a_stream_go_on_or_are_given() -> None:
    last, seen = torch.tensor([2, 0]), torch.tensor([5, 0])
    assert continue_segments("x", last, seen, Mask(), 2).tolist() == [[2, 2], [0, 0]]
    given_ones = Mask(segments=torch.tensor([[2, 3], [-1, -1]]))
    assert continue_segments("x", last, seen, given_ones, 2).tolist() == [[2, 3], [-1, -1]]
    with pytest.raises(ValueError, match=r"x: segment numbers must not decrease along a stream; go on from \[2, 0\]"):
        continue_segments("x", last, seen, Mask(segments=torch.tensor([[1, 3], [0, 0]])), 2)
