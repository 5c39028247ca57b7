"""Products over tokens, in blocks or by Fourier transforms, are those of the whole matrix."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad.ops.positions import causal_toeplitz, toeplitz
from subquad.ops.positions import token_product as blocks
from subquad.ops.positions.causal_toeplitz import causal_toeplitz_product
from subquad.ops.positions.toeplitz import (
    toeplitz_matrix,
    toeplitz_product,
    toeplitz_product_by_matrix,
    transform_length,
)
from subquad.ops.positions.token_product import token_product, token_product_at_once

LENGTHS = st.sampled_from([1, 2, 3, 4, 8, 9, 17])


def assert_same(y: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(y)
    pairs = (torch.autograd.grad((out * weights).sum(), leaves) for out in (y, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@given(length=LENGTHS, batch=st.integers(0, 3), causal=st.booleans(), block=st.integers(1, 20))
def test_blocks_equal_the_definition(length: int, batch: int, causal: bool, block: int) -> None:
    weights = torch.randn(20, 20, dtype=torch.float64, requires_grad=True)
    x = torch.randn(batch, length, 3, dtype=torch.float64, requires_grad=True)
    part = weights[:length, :length]
    with patch.object(blocks, "BLOCK", block):
        assert_same(token_product(part, x, causal=causal), token_product_at_once(part, x, causal=causal), [weights, x])


@given(length=LENGTHS, batch=st.integers(0, 3), numbers=st.sampled_from([1, 64, 10**6]))
def test_transforms_equal_the_definition(length: int, batch: int, numbers: int) -> None:
    lags = torch.randn(2 * length - 1, dtype=torch.float64, requires_grad=True)
    x = torch.randn(batch, length, 5, dtype=torch.float64, requires_grad=True)
    with patch.object(toeplitz, "SLICE", numbers):
        assert_same(toeplitz_product(lags, x), toeplitz_product_by_matrix(lags, x), [lags, x])


def test_a_toeplitz_matrix_has_a_lag_on_each_diagonal() -> None:
    assert toeplitz_matrix(torch.tensor([-1, 10, 1]), 2).tolist() == [[10, -1], [1, 10]]
    assert toeplitz_matrix(torch.tensor([10, 1, 2]), 3).tolist() == [[10, 0, 0], [1, 10, 0], [2, 1, 10]]


@pytest.mark.parametrize(("length", "size"), [(1, 1), (2, 4), (3, 8), (4, 8), (5, 16), (4096, 8192)])
def test_a_transform_holds_all_lags(length: int, size: int) -> None:
    assert transform_length(length) == size


@given(
    length=st.integers(1, 70),
    batch=st.integers(0, 2),
    numbers=st.sampled_from([1, 64, 10**6]),
    log=st.integers(0, 4),
)
def test_causal_transforms_equal_the_definition(length: int, batch: int, numbers: int, log: int) -> None:
    lags = torch.randn(length, dtype=torch.float64, requires_grad=True)
    x = torch.randn(batch, length, 5, dtype=torch.float64, requires_grad=True)
    with patch.object(toeplitz, "SLICE", numbers), patch.object(causal_toeplitz, "BLOCK", 2**log):
        assert_same(causal_toeplitz_product(lags, x), toeplitz_product_by_matrix(lags, x), [lags, x])


@given(place=st.integers(1, 40))
def test_not_a_bit_of_the_future_shows_in_a_causal_product(place: int) -> None:
    lags, x = torch.randn(41), torch.randn(1, 41, 2, requires_grad=True)
    changed = x.detach().clone()
    changed[:, place:] = 1e30
    with patch.object(causal_toeplitz, "BLOCK", 4):
        y = causal_toeplitz_product(lags, x)
        assert torch.equal(causal_toeplitz_product(lags, changed)[:, :place], y[:, :place])
        (of_x,) = torch.autograd.grad(y[:, :place].square().sum(), x)
    assert not of_x[:, place:].any()


@pytest.mark.parametrize(("product", "count"), [(toeplitz_product, 17), (causal_toeplitz_product, 9)])
def test_bfloat16_is_that_of_float32_rounded(product: Callable[[Tensor, Tensor], Tensor], count: int) -> None:
    lags, x = torch.randn(count).bfloat16(), torch.randn(2, 9, 3).bfloat16()
    expected = toeplitz_product_by_matrix(lags.float(), x.float())
    assert torch.equal(product(lags, x), product(lags.float(), x.float()).bfloat16())
    torch.testing.assert_close(product(lags, x).float(), expected, rtol=1e-2, atol=1e-2)
