"""Linear attention from running sums equals its definition by pairs, for every chunk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import subquad
from subquad.ops.linear import Sums, causal_sums, linear_attention, linear_attention_by_pairs


def features(length: int, *, key_length: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    key_length = length if key_length is None else key_length
    q = torch.rand(2, 3, length, 4, dtype=torch.float64, requires_grad=True)
    k = torch.rand(2, 3, key_length, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 3, key_length, 5, dtype=torch.float64, requires_grad=True)
    return q, k, v


@given(
    length=st.sampled_from([1, 2, 63, 64, 65, 130]),
    causal=st.booleans(),
    normalize=st.booleans(),
    share=st.sampled_from([None, 0.0, 0.5]),
)
def test_sums_equal_the_definition(length: int, causal: bool, normalize: bool, share: float | None) -> None:
    q, k, v = features(length, key_length=length if causal else 7)
    valid = None if share is None else torch.rand(2, k.shape[2]) < share
    out = linear_attention(q, k, v, causal=causal, normalize=normalize, valid=valid)
    expected = linear_attention_by_pairs(q, k, v, causal=causal, normalize=normalize, valid=valid)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(out)
    pairs = (torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (out, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@given(length=st.integers(1, 20), cut=st.integers(0, 20), chunk=st.integers(1, 25))
def test_sums_go_on_from_earlier_tokens(length: int, cut: int, chunk: int) -> None:
    q, k, v = features(length)
    cut = min(cut, length - 1)
    whole, after = causal_sums(q, k, v, None, chunk=chunk)
    before = None
    if cut:
        _, before = causal_sums(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], None, chunk=3)
    rest, end = causal_sums(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], before, chunk=chunk)
    torch.testing.assert_close(rest, whole[:, :, cut:], rtol=1e-10, atol=1e-10)
    for one, other in zip(end, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert isinstance(end, Sums)


def test_a_row_without_keys_gives_zero() -> None:
    q, k, v = features(4)
    out = linear_attention(q, k, v, causal=False, valid=torch.zeros(2, 4, dtype=torch.bool))
    assert not out.any()


@pytest.mark.parametrize("causal", [False, True])
def test_narrow_inputs_are_summed_in_float32(causal: bool) -> None:
    ones = torch.ones(1, 1, 3000, 2, dtype=torch.bfloat16)
    out = linear_attention(ones, ones, ones, causal=causal, normalize=False)
    assert out.dtype == torch.bfloat16
    assert float(out[0, 0, -1, 0]) == pytest.approx(6000, rel=0.01)


def test_it_is_public() -> None:
    assert subquad.ops.linear_attention is linear_attention


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 3, 4), (2, 3, 4, 4), (2, 3, 4, 4)), {}, r"must be \(B, H, L, E\), got 3, 4, 4 dimensions"),
        (((2, 3, 4, 4), (2, 3, 4, 5), (2, 3, 4, 4)), {}, r"expected q \(B, H, L, F\), .* got \(2, 3, 4, 4\)"),
        (((2, 3, 4, 4), (2, 3, 5, 4), (2, 3, 4, 4)), {}, r"expected q \(B, H, L, F\)"),
        (((2, 3, 4, 4), (2, 3, 5, 4), (2, 3, 5, 4)), {"causal": True}, "causal=True needs as many keys as queries"),
        (((2, 3, 4, 4),) * 3, {"valid": torch.ones(2, 4)}, r"valid must be bool \(2, 4\), got torch.float32"),
        (
            ((2, 3, 4, 4),) * 3,
            {"valid": torch.ones(2, 5, dtype=torch.bool)},
            r"valid must be bool \(2, 4\), .* \(2, 5\)",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shapes: tuple[tuple[int, ...], ...], options: dict[str, object], message: str
) -> None:
    q, k, v = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        linear_attention(q, k, v, **{"causal": False, **options})  # pyright: ignore[reportArgumentType] - cases


@pytest.mark.parametrize("causal", [False, True])
def test_autocast_does_not_narrow_the_sums(causal: bool) -> None:
    q, k, v = (torch.rand(1, 2, 300, 4) for _ in range(3))
    expected = linear_attention(q, k, v, causal=causal)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_attention(q, k, v, causal=causal), expected)
