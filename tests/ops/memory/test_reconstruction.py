"""Losses of a compression: what they are of, and what learns from them."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.memory.reconstruction import Squares, attention_squares, mean_of, squares


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_attention_is_compared_head_by_head_without_positions() -> None:
    q, k, v, row_k, row_v = (random(2, 3, count, 4) for count in (5, 6, 6, 2, 2))
    found = attention_squares(q, k, v, row_k, row_v)
    reads = [(q @ keys.mT / 2).softmax(dim=-1) @ values for keys, values in ((k, v), (row_k, row_v))]
    torch.testing.assert_close(found.total, (reads[0] - reads[1]).square().sum())
    assert found.elements == 2 * 3 * 5 * 4


def test_only_the_rows_learn() -> None:
    given = [random(2, 3, count, 4) for count in (5, 6, 6, 2, 2)]
    gradients = torch.autograd.grad(attention_squares(*given).total, given, allow_unused=True)
    assert [gradient is not None for gradient in gradients] == [False, False, False, True, True]
    found, wanted = random(3), random(3)
    gradients = torch.autograd.grad(squares(found, wanted).total, (found, wanted), allow_unused=True)
    assert gradients[0] is not None
    assert gradients[1] is None


def test_rows_equal_to_all_tokens_lose_nothing() -> None:
    token_k, token_v = (torch.randn(1, 2, 1, 4, dtype=torch.float64) for _ in range(2))
    q, many = torch.randn(1, 2, 5, 4, dtype=torch.float64), (1, 2, 6, 4)
    loss = attention_squares(q, token_k.expand(many), token_v.expand(many), token_k, token_v).total
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-20)


def test_the_mean_is_over_all_elements_and_zero_of_nothing() -> None:
    parts = [Squares(torch.tensor(6.0), 2), Squares(torch.tensor(4.0), 3)]
    assert mean_of(parts, torch.zeros(1)) == 2.0
    assert mean_of([], torch.zeros(1)) == 0.0
