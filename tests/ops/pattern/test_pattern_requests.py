"""What pattern attention refuses, and what it leaves a receipt for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from long_patterns import heads, triple

from subquad import Mask, receipts
from subquad.ops import pattern_attention, pattern_attention_with_lse
from subquad.patterns import Block, Causal, Columns, Documents, Global, Ngram, Pattern, Sink, Window
from subquad.patterns.expression import write_pattern

SORTED = Mask(segments=torch.arange(20, dtype=torch.uint8)[None] // 10)
UNSORTED = Mask(segments=SORTED.segments.flip(1))  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": Ngram(1)}, "no query sees any key"),
        ({"pattern": Causal() & ~Causal()}, "no query sees any key"),
        ({"pattern": ~Columns(4, 4)}, "no query sees any key"),
        ({"pattern": Causal().heads({1: Ngram(1)})}, r"no query of head 1 sees any key in Ngram\(1\)"),
        ({"pattern": Ngram(1).heads({0: Causal()})}, "no query of head 1 sees any key"),
        ({"pattern": Global(20)}, "index 20 lies past the end"),
        ({"pattern": Window(1, 1).heads({2: Causal()})}, r"speaks of head 2, q has 2 heads, counted from 0; give"),
        ({"pattern": "causal"}, "must come from subquad.patterns, got str"),
        ({"k": torch.zeros(1, 2, 20, 4)}, "one floating-point dtype"),
        ({"v": torch.zeros(1, 2, 19, 4, dtype=torch.float64)}, r"expected q \(B, H, L, E\)"),
        ({"q": torch.zeros(2, 20, 4, dtype=torch.float64)}, r"must be \(batch, heads, length, width\)"),
        ({"key_valid": torch.ones(1, 19, dtype=torch.bool)}, r"key_valid must have shape \(B, S\) = \(1, 20\)"),
        ({"key_valid": torch.ones(1, 20)}, "key_valid must be bool"),
        (
            {"query_offset": -1},
            "query_offset must be an integer of at least 0, got -1; it is the position of the first",
        ),
        ({"query_offset": 1.5}, "query_offset must be an integer of at least 0, got 1.5"),
        ({"query_offset": True}, "query_offset must be an integer of at least 0, got True"),
        ({"query_offset": torch.tensor([-3])}, "query_offset must be an integer of at least 0, got -3"),
        ({"query_offset": torch.ones(1, dtype=torch.bool)}, r"int64 \(B,\) = \(1,\), got torch.bool"),
        ({"mask": torch.ones(1, 20, dtype=torch.bool)}, r"must be a subquad.Mask, got Tensor; write Mask\(valid=...\)"),
        ({"key_valid": [True] * 20}, r"key_valid must be a tensor \(B, S\) = \(1, 20\), got list"),
        ({"scale": torch.ones(())}, "scale must be a number, got a tensor; multiply q by it"),
        ({"mask": UNSORTED}, "segments must not decrease along a sequence"),
        ({"query_offset": torch.zeros(2, dtype=torch.int64)}, r"int64 \(B,\) = \(1,\)"),
        ({"key_segments": torch.zeros(1, 20), "mask": SORTED}, "key_segments must hold integers, got torch.float32"),
        ({"key_segments": torch.zeros(1, 20, dtype=torch.int64)}, "compared with mask.segments, which are missing"),
        ({"backend": "fast"}, "unknown backend 'fast'; known: blocked, dense, flex"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {name: heads(20) for name in ("q", "k", "v")} | {"pattern": Causal()} | change
    with pytest.raises(ValueError, match=message):
        pattern_attention(**call)


def test_tensors_of_another_device_are_refused() -> None:
    q = heads(20)
    with pytest.raises(ValueError, match="q is on cpu but k is on meta; move it there"):
        pattern_attention(q, q.detach().to("meta"), q, Causal())


def test_facts_on_another_device_are_refused() -> None:
    q, ones = heads(20), torch.ones(1, 20, dtype=torch.int64)
    with pytest.raises(ValueError, match="key_valid is on meta but q is on cpu; move it there"):
        pattern_attention(q, q, q, Causal(), key_valid=ones.to("meta", torch.bool))
    with pytest.raises(ValueError, match="key_segments is on meta but q is on cpu; move it there"):
        pattern_attention(q, q, q, Causal(), mask=Mask(segments=ones), key_segments=ones.to("meta"))


@pytest.mark.parametrize("pattern", [Causal().heads({0: Ngram(2)}), Ngram(2).heads({1: Sink(1)})])
def test_heads_that_a_pattern_does_not_name_keep_it(pattern: Pattern) -> None:
    q, k, v = triple(20)
    pattern_attention(q, k, v, pattern)


def test_a_base_that_no_head_uses_may_be_empty() -> None:
    q, k, v = triple(20)
    pattern_attention(q, k, v, Ngram(1).heads({0: Causal(), 1: Causal()}))


def test_short_sequences_run_densely_and_say_so() -> None:
    q, k, v = triple(20)
    with receipts() as collected:
        pattern_attention(q, k, v, Window(9, 9) | Sink(2))
        pattern_attention(q, k, v, Window(9, 9) | Sink(2), backend="blocked")
    by_default, by_name = collected.entries
    assert (by_default.where, by_default.asked) == ("pattern_attention", "the default, blocked")
    assert by_name.asked == "blocked"
    assert "dense attention in slices" in by_name.ran
    assert "20 queries and 20 keys" in by_name.reason


def test_heads_that_run_densely_say_so() -> None:
    scattered = Documents([position % 97 for position in range(2048)])
    q, k, v = triple(2048)
    with receipts() as collected:
        pattern_attention(q, k, v, Window(64, 64).heads({1: scattered}))
    (receipt,) = collected.entries
    assert receipt.ran == "dense attention in slices of queries in head 1"


@pytest.mark.parametrize(
    "pattern", [Columns(30, 1), Window(0, 0) & ~Block(3), Block(4) & ~Window(3, 3), ~Documents([0] * 20)]
)
def test_a_pattern_that_is_empty_at_this_length_says_so(pattern: Pattern) -> None:
    q, k, v = triple(20)
    with receipts() as collected:
        out = pattern_attention(q, k, v, pattern)
    assert not out.any()
    (receipt,) = collected.entries
    assert (receipt.asked, receipt.ran) == (write_pattern(pattern), "no attention: the result is 0")


def test_an_empty_pattern_that_global_tokens_of_the_mask_fill_says_nothing_of_zeros() -> None:
    q, k, v = triple(20)
    with receipts() as collected:
        out = pattern_attention(q, k, v, Columns(30, 1), mask=Mask(global_tokens=torch.arange(20)[None] == 3))
    torch.testing.assert_close(out, v[:, :, 3:4].expand_as(out))
    assert not [receipt.ran for receipt in collected.entries if "result is 0" in receipt.ran]


def test_a_head_that_is_empty_at_this_length_says_so() -> None:
    q, k, v = triple(20)
    with receipts() as collected:
        out, lse = pattern_attention_with_lse(q, k, v, Causal().heads({1: Columns(30, 1)}))
    assert not out[:, 1].any()
    assert lse[:, 1].isneginf().all()
    assert "no attention: the result is 0 in head 1" in [receipt.ran for receipt in collected.entries]
