"""Decayed products of queries and keys equal their definition, however fast the past fades."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad.ops.recurrence.decayed_pairs import (
    decayed_pairs,
    decayed_pairs_by_definition,
    decayed_pairs_gradient,
    decays,
)


def chunks(size: int, decay_width: int, strength: float) -> tuple[Tensor, Tensor, Tensor]:
    """Two kinds of queries (3, 2, C, 4), keys (3, C, 4) and log-decays."""
    q, k = (torch.randn(*shape, size, 4, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (3,)))
    log_decay = -strength * torch.rand(3, size, decay_width, dtype=torch.float64)
    return q, k, log_decay.requires_grad_()


@pytest.mark.parametrize("decay_width", [1, 4])
@given(size=st.sampled_from([1, 2, 4, 16, 32]), strength=st.sampled_from([0.0, 1.0, 5.0, 1000.0]))
def test_values_and_gradients_equal_the_definition(decay_width: int, size: int, strength: float) -> None:
    q, k, log_decay = chunks(size, decay_width, strength)
    decay = decays(log_decay.detach())
    pairs, expected = decayed_pairs(q, k, decay), decayed_pairs_by_definition(q, k, log_decay)
    torch.testing.assert_close(pairs, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(pairs).tril()
    of_q, of_k = decayed_pairs_gradient(grad, q, k, decay)
    wanted = torch.autograd.grad((expected * grad).sum(), (q, k, log_decay))
    of_sums = (q * of_q).sum(dim=-3) - k * of_k
    of_sums = of_sums.sum(dim=-1, keepdim=True) if decay_width == 1 else of_sums
    of_decay = of_sums.flip(-2).cumsum(dim=-2).flip(-2)
    for found, right in zip((of_q, of_k, of_decay), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)


def test_one_token_that_forgets_everything_is_no_overflow() -> None:
    q, k, _ = chunks(64, 1, 0.0)
    log_decay = torch.full((3, 64, 1), -0.01)
    log_decay[:, 20] = -1e4
    pairs = decayed_pairs(q.float(), k.float(), decays(log_decay))
    assert bool(pairs.isfinite().all())
    assert not pairs[..., 20:, :20].any()
    assert bool(pairs[..., 40, 20:41].all())
