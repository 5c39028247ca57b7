"""The distribution that the next token is drawn from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from subquad.models.sampling import Sampling, choose


@given(
    st.integers(0, 1000),
    st.floats(0.1, 4.0),
    st.none() | st.integers(1, 12),
    st.none() | st.floats(0.05, 0.99),
)
def test_probabilities_are_those_of_hugging_face(
    seed: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tokens: Any = torch.zeros(4, 1, dtype=torch.int64)
    scores = TemperatureLogitsWarper(temperature)(tokens, logits)
    scores = scores if top_k is None else TopKLogitsWarper(top_k)(tokens, scores)
    scores = scores if top_p is None else TopPLogitsWarper(top_p)(tokens, scores)
    found = Sampling(temperature, top_k, top_p).probabilities(logits)
    torch.testing.assert_close(found, scores.softmax(dim=-1), rtol=1e-9, atol=1e-12)


def test_the_most_probable_token_is_always_kept() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert Sampling(top_p=1e-6).probabilities(logits).tolist() == [[0.0, 1.0, 0.0]]
    assert Sampling(top_k=1).probabilities(logits).tolist() == [[0.0, 1.0, 0.0]]


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, -1)
    drawn = choose(logits, Sampling(), torch.Generator().manual_seed(0))
    frequencies = drawn.bincount(minlength=3) / 20_000
    torch.testing.assert_close(frequencies, torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=0.015)  # 4 standard errors
    assert choose(logits[:2], None, torch.Generator()).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0; sampling=None is greedy"),
        ({"top_k": 0}, "top_k must be at least 1, got 0; None keeps all tokens"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
    ],
)
def test_what_is_no_restriction_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
