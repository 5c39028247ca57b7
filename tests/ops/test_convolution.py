"""Convolution along the length equals its definition, in values and all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad.ops.convolution import BLOCK, convolve_heads, convolve_heads_by_channels


def inputs(length: int, kernel: int, *, by_token: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x and what is added to its convolution (2, 3, length, 4), and kernels."""
    shape = (2, length, 3, 4) if by_token else (2, 3, length, 4)
    x, added = (torch.randn(shape, dtype=dtype) for _ in range(2))
    heads = [y.transpose(1, 2) if by_token else y for y in (x, added)]
    return [y.requires_grad_() for y in (heads[0], torch.randn(3, kernel, dtype=dtype), heads[1])]


@given(
    length=st.sampled_from([1, 2, 9, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5]),
    kernel=st.sampled_from([1, 3, 35, 2 * BLOCK + 1]),
    by_token=st.booleans(),
)
def test_it_equals_the_definition(length: int, kernel: int, by_token: bool) -> None:
    leaves = inputs(length, kernel, by_token=by_token)
    y, expected = convolve_heads(*leaves), convolve_heads_by_channels(*leaves)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(y)
    pairs = (torch.autograd.grad((found * weights).sum(), leaves) for found in (y, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_definition_is_a_sum_over_neighbours() -> None:
    x, kernels, added = (y.detach() for y in inputs(7, 3, by_token=False))
    for i in range(7):
        near = [(t, i + t - 1) for t in range(3) if 0 <= i + t - 1 < 7]
        expected = added[:, :, i] + sum(kernels[:, t, None] * x[:, :, j] for t, j in near)
        torch.testing.assert_close(convolve_heads(x, kernels, added)[:, :, i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_a_gradient_that_is_not_wanted_is_not_computed(wanted: int) -> None:
    leaves = [y.detach() for y in inputs(9, 3, by_token=True)]
    leaves[wanted].requires_grad_()
    convolve_heads(*leaves).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [wanted == place for place in range(3)]


def test_narrow_inputs_are_summed_in_float32() -> None:
    leaves = [y.detach() for y in inputs(300, 129, by_token=True, dtype=torch.bfloat16)]
    expected = convolve_heads_by_channels(*(y.double() for y in leaves))
    y = convolve_heads(*leaves)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=2**-7)
