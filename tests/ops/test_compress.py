"""Compression along the length: by one product for many heads, and by blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad.ops import onednn
from subquad.ops.compress import block_maxima, block_means, block_sums, compress, compress_by_matmul


@pytest.fixture(autouse=True)
def no_product_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products are left to the definition."""
    monkeypatch.setattr("subquad.ops.compress.SMALLEST_PRODUCT", 0)


def heads(batch: int, length: int, *, by_token: bool) -> Tensor:
    """(B, 4, S, 3), laid out by heads or, as projections do, by tokens."""
    shape = (batch, length, 4, 3) if by_token else (batch, 4, length, 3)
    x = torch.randn(shape, dtype=torch.float64)
    return (x.transpose(1, 2) if by_token else x).requires_grad_()


@given(
    batch=st.sampled_from([1, 3]),
    length=st.sampled_from([1, 2, 7, 20]),
    matrices=st.sampled_from([1, 2, 4]),
    by_token=st.booleans(),
    cut=st.booleans(),
)
def test_products_equal_the_definition(batch: int, length: int, matrices: int, by_token: bool, cut: bool) -> None:
    x, wide = heads(batch, length, by_token=by_token), torch.randn(matrices, 5, 20, dtype=torch.float64)
    p = wide[..., :length].requires_grad_() if cut else wide[..., :length].clone().requires_grad_()
    rows, expected = compress(x, p), compress_by_matmul(x, p.repeat_interleave(4 // matrices, dim=0))
    torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(rows)
    pairs = (torch.autograd.grad((found * weights).sum(), (x, p)) for found in (rows, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_gradient_that_is_not_wanted_is_not_computed(wanted: int) -> None:
    leaves = [heads(2, 7, by_token=True).detach(), torch.randn(1, 5, 7, dtype=torch.float64)]
    leaves[wanted].requires_grad_()
    compress(leaves[0], leaves[1]).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [wanted == 0, wanted == 1]


def test_what_no_gradient_needs_is_not_kept() -> None:
    x = torch.randn(2, 4, 30, 3, requires_grad=True)
    rows = compress(x, torch.randn(1, 5, 30))
    assert rows.grad_fn.saved_tensors[0] is None  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


def test_large_products_by_onednn_equal_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    x, p = torch.randn(1, 300, 2, 64).transpose(1, 2), torch.randn(1, 128, 300)
    expected = compress_by_matmul(x.double(), p.double()).float()
    torch.testing.assert_close(compress(x, p), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(onednn, "has_onednn", lambda: False)
    torch.testing.assert_close(compress(x, p), expected, rtol=1e-4, atol=1e-4)


def test_no_copy_is_made_of_heads_that_lie_beside_each_other() -> None:
    x = torch.randn(2, 30, 4, 3).transpose(1, 2).requires_grad_()
    rows = compress(x, torch.randn(1, 5, 30, requires_grad=True))
    kept = rows.grad_fn.saved_tensors[0]  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    assert kept.data_ptr() == x.data_ptr()


@given(length=st.integers(1, 12), size=st.integers(1, 13), share=st.sampled_from([None, 0.0, 0.5]))
def test_blocks_equal_loops_over_their_tokens(length: int, size: int, share: float | None) -> None:
    x, weights = heads(2, length, by_token=False), torch.randn(4, size, 3, dtype=torch.float64)
    valid = None if share is None else torch.rand(2, length) < share
    results = (block_means(x, size, valid), block_maxima(x, size, valid), block_sums(x, weights, valid))
    for means, maxima, sums, start in zip(*(r.unbind(2) for r in results), range(0, length, size), strict=True):
        for b in range(2):
            tokens = [j for j in range(start, min(start + size, length)) if valid is None or bool(valid[b, j])]
            some = x[b][:, tokens] if tokens else torch.zeros_like(x[b, :, :1])
            torch.testing.assert_close(means[b], some.mean(dim=1))
            torch.testing.assert_close(maxima[b], some.amax(dim=1))
            expected = sum((weights[:, j - start] * x[b, :, j] for j in tokens), torch.zeros(4, 3).double())
            torch.testing.assert_close(sums[b], expected)


@pytest.mark.parametrize("pool", [block_means, block_maxima], ids=["means", "maxima"])
def test_invalid_tokens_get_no_gradient(pool: Callable[[Tensor, int, Tensor], Tensor]) -> None:
    x, valid = heads(1, 6, by_token=False), torch.tensor([[True, False, True, True, False, False]])
    (gradient,) = torch.autograd.grad(pool(x, 2, valid).sum(), x)
    assert not gradient[:, :, ~valid[0]].any()
    torch.testing.assert_close(gradient[:, :, valid[0]].sum(dim=2), torch.full((1, 4, 3), 2.0, dtype=torch.float64))
