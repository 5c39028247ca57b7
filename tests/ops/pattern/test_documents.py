"""Documents and padding hide whole stretches of keys: these aren't computed, and the rest is what it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from long_patterns import assert_backends_agree, triple

from subquad import Mask, receipts
from subquad.ops import pattern_attention
from subquad.ops.pattern import example_facts
from subquad.ops.pattern.blocked import plan_pattern
from subquad.ops.pattern.example_facts import ExampleFacts
from subquad.ops.pattern.request import Facts
from subquad.ops.pattern.strip_piece import StripPiece
from subquad.ops.pattern.strips import Shape
from subquad.patterns import Causal, Columns, Dilated, Pattern, Sink, Strided, Window

EVERYTHING = Strided(1)
PATTERNS = [
    EVERYTHING,
    Causal(),
    Window(70, 20),
    Dilated(9, 9, 5),
    Causal() & (Window(40, 0) | Columns(16, 2) | Sink(3)),
    Causal().heads({1: Dilated(20, 3, 2)}),
]


@given(
    pattern=st.sampled_from(PATTERNS),
    length=st.sampled_from([1, 65, 192, 333]),
    borders=st.lists(st.integers(0, 332), max_size=6),
    start=st.integers(0, 40),
    end=st.integers(0, 333),
    padded=st.booleans(),
)
def test_strips_cut_to_what_is_seen_equal_the_definition(
    pattern: Pattern, length: int, borders: list[int], start: int, end: int, padded: bool
) -> None:
    place = torch.arange(length)
    segments = (place[:, None] >= torch.tensor(sorted(borders), dtype=torch.int64)).sum(dim=1)
    valid = ((place >= start) & (place < end))[None] if padded else None
    mask = Mask(valid, segments[None])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example_facts, "TRIMMED_PAIRS", 1)
        patch.setattr(example_facts, "STRIP_PRICE", 0.0)
        assert_backends_agree(*triple(length), pattern, mask=mask)


def computed_pairs(pattern: Pattern, segments: torch.Tensor) -> int:
    """Of the strips of one head."""
    length = len(segments)
    (part,) = plan_pattern(pattern, Shape(2, length, length, 0, 6144), sliced=True).parts
    assert isinstance(part.piece, StripPiece)
    facts = ExampleFacts.of(Facts(query_segments=segments, key_segments=segments))
    strips = facts.restrict(part.piece.strips, part.piece.numbering)
    return int(((strips.row1 - strips.row0) * (strips.column1 - strips.column0)).sum())


@pytest.mark.parametrize(("pattern", "most"), [(EVERYTHING, 2.0), (Causal(), 3.0)], ids=["everything", "causal"])
def test_the_price_of_packed_documents_is_that_of_their_own_pairs(pattern: Pattern, most: float) -> None:
    """Strips of 192 rows around documents of 512 tokens see at most two of them."""
    segments = torch.arange(8192) // 512
    inside = int(pattern.dense(512).sum()) * 16
    assert computed_pairs(pattern, segments) <= most * inside


def test_short_sequences_leave_the_slices_where_documents_are_short() -> None:
    q, k, v = triple(1024)
    for size, expected in ((64, []), (1024, ["dense attention in slices of queries"])):
        with receipts() as left:
            pattern_attention(
                q, k, v, EVERYTHING, mask=Mask(torch.arange(1024)[None] >= 0, torch.arange(1024)[None] // size)
            )
        assert [receipt.ran for receipt in left.entries] == expected
