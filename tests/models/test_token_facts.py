"""From Hugging Face's masks to one over the stream."""

from __future__ import annotations

import pytest
import torch

from subquad.mask import Mask
from subquad.models.token_facts import TokenFacts, behind_prepended, context_mask

ATTENTION = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
X = torch.zeros(2, 4, 3)


def test_of_all_tokens_so_far_the_new_ones_are_kept() -> None:
    facts = TokenFacts(ATTENTION).newest(2, 2, past=2)
    assert facts.attention is not None
    assert facts.attention.tolist() == [[1, 1], [1, 1]]
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(B, L\) = \(2, 2\), got \(2, 4\)"):
        TokenFacts(ATTENTION).newest(2, 2, past=0)
    with pytest.raises(ValueError, match=r"segment_ids must have shape \(B, L\) = \(2, 2\), got \(2, 4\)"):
        TokenFacts(segments=ATTENTION).newest(2, 2, past=2)


def test_the_first_valid_token_is_global_in_rows_that_begin() -> None:
    begins = torch.tensor([True, False])
    mask = TokenFacts(ATTENTION).mask(X, 0, first_is_global=begins)
    assert mask is not None
    assert mask.global_tokens is not None
    assert mask.global_tokens.tolist() == [[False, True, False, False], [False] * 4]
    asked = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 1]])
    mask = TokenFacts(ATTENTION, global_tokens=asked).mask(X, 0, first_is_global=begins)
    assert mask is not None
    assert mask.global_tokens is not None
    assert mask.global_tokens.tolist() == [[False, True, False, True], [False, False, False, True]]


def test_prepended_vectors_are_valid_and_belong_to_the_first_document() -> None:
    mask = TokenFacts(ATTENTION, ATTENTION + 4).mask(torch.zeros(2, 5, 3), 1, first_is_global=None)
    assert mask is not None
    assert mask.valid is not None
    assert mask.segments is not None
    assert mask.valid.tolist() == [[True, False, True, True, True], [True] * 5]
    assert mask.segments.tolist() == [[4, 4, 5, 5, 5], [5] * 5]
    behind = behind_prepended(Mask(global_tokens=mask.valid), 2)
    assert behind is not None
    assert behind.global_tokens is not None
    assert behind.global_tokens.tolist() == [[False, False, True, False, True, True, True], [False, False, *[True] * 5]]


def test_without_facts_there_is_no_mask() -> None:
    assert TokenFacts().mask(X, 0, first_is_global=None) is None
    assert behind_prepended(None, 3) is None
    assert context_mask(None, None) is None


@pytest.mark.parametrize("value", [0.5, 2, -1, float("-inf"), float("nan")])
def test_marks_other_than_0_and_1_are_refused(value: float) -> None:
    marks = ATTENTION.clone().to(torch.float32 if isinstance(value, float) else torch.int64)
    for kept in (marks, marks.bool()):
        mask = context_mask(kept, None)
        assert mask is not None
        assert mask.valid is not None
        assert torch.equal(mask.valid, ATTENTION.bool())
    marks[1, 2] = value
    message = f"must be bool or hold 0 and 1, with 1 for {{}}, got {value}; it marks tokens"
    with pytest.raises(ValueError, match="SubquadModel: attention_mask " + message.format("tokens to keep")):
        TokenFacts(marks).mask(X, 0, first_is_global=None)
    with pytest.raises(ValueError, match="SubquadModel: global_attention_mask " + message.format("global tokens")):
        TokenFacts(global_tokens=marks).mask(X, 0, first_is_global=None)
    with pytest.raises(ValueError, match="SubquadModel: encoder_attention_mask " + message.format("tokens to keep")):
        context_mask(marks, None)


def test_marks_are_read_where_they_have_values_and_no_graph_is_made() -> None:
    marks = ATTENTION.float() * 0.5
    on_meta = context_mask(marks.to("meta"), None)
    assert on_meta is not None
    assert on_meta.valid is not None
    assert on_meta.valid.shape == (2, 4)

    def kept(given: torch.Tensor) -> torch.Tensor:
        mask = context_mask(given, None)
        assert mask is not None
        assert mask.valid is not None
        return mask.valid

    assert torch.equal(torch.compile(kept, backend="eager", fullgraph=True)(marks), marks != 0)
