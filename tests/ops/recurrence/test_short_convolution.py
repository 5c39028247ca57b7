"""The short convolution equals its definition, goes on from earlier tokens, and is torch's depthwise convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from subquad.ops.recurrence.short_convolution import short_convolution, short_convolution_by_tokens, unit_vectors


@given(length=st.sampled_from([1, 2, 5, 9]), kernel=st.integers(2, 5), fresh=st.booleans())
def test_taps_equal_the_definition(length: int, kernel: int, fresh: bool) -> None:
    x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(kernel, 3, dtype=torch.float64, requires_grad=True)
    before = None if fresh else torch.randn(2, kernel - 1, 3, dtype=torch.float64, requires_grad=True)
    y, expected = short_convolution(x, weight, before), short_convolution_by_tokens(x, weight, before)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    leaves = [x, weight] if before is None else [x, weight, before]
    weights = torch.randn_like(y)
    pairs = (torch.autograd.grad((out * weights).sum(), leaves) for out in (y, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_it_is_a_depthwise_convolution() -> None:
    x, weight = torch.randn(2, 9, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    padded = F.pad(x.mT, (3, 0))
    expected = F.conv1d(padded, weight.flip(0).T[:, None], groups=3).mT
    torch.testing.assert_close(short_convolution(x, weight), expected, rtol=1e-10, atol=1e-10)


def test_vectors_have_length_one_and_zero_stays_zero() -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    x[2] = 0
    x.requires_grad_()
    lengths = unit_vectors(x).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 1, 0, 1, 1]).double(), rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(unit_vectors(x).sum(), x)
    assert bool(grad.isfinite().all())
