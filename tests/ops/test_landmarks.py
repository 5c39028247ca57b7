"""Attention through landmarks equals its definition by matrices; the pseudo-inverse is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad.benchmark.memory import saved_bytes
from subquad.ops.landmarks import landmark_attention, landmark_attention_by_matrices, pseudo_inverse

OPTIONS: Any = {"landmarks": 4, "iterations": 6}


def heads(length: int, *, by_token: bool = False, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shape = (2, length, 3, 5) if by_token else (2, 3, length, 5)
    drawn = (torch.randn(shape, dtype=dtype) for _ in range(3))
    return [(x.transpose(1, 2) if by_token else x).requires_grad_() for x in drawn]


@given(
    length=st.integers(1, 30),
    landmarks=st.integers(1, 9),
    iterations=st.sampled_from([1, 6]),
    share=st.sampled_from([None, 0.0, 0.3, 0.8]),
    by_token=st.booleans(),
)
def test_it_equals_the_definition(
    length: int, landmarks: int, iterations: int, share: float | None, by_token: bool
) -> None:
    inputs = heads(length, by_token=by_token)
    valid = None if share is None else torch.rand(2, length) < share
    options = {"landmarks": min(landmarks, length), "iterations": iterations}
    out = landmark_attention(*inputs, **options, valid=valid)
    expected = landmark_attention_by_matrices(*inputs, **options, valid=valid)
    real = torch.ones(2, length).bool() if valid is None else valid
    out, expected = (y.transpose(1, 2)[real] for y in (out, expected))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(out)
    pairs = (torch.autograd.grad((y * weights).sum(), inputs) for y in (out, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@given(length=st.integers(4, 20))
def test_the_definition_is_that_of_the_paper(length: int) -> None:
    q, k, v = heads(length)
    few_q, few_k = (torch.stack([part.mean(dim=2) for part in x.tensor_split(4, dim=2)], dim=2) for x in (q, k))
    f, a, b = ((x @ y.mT / 5**0.5).softmax(dim=-1) for x, y in ((q, few_k), (few_q, few_k), (few_q, k)))
    expected = f @ pseudo_inverse(a, 6) @ (b @ v)
    torch.testing.assert_close(landmark_attention(q, k, v, **OPTIONS), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("iterations", "error"), [(6, 0.2), (12, 1e-2), (30, 1e-10)])
def test_the_pseudo_inverse_undoes_and_redoes_a_matrix(iterations: int, error: float) -> None:
    a = torch.randn(2, 3, 16, 16, dtype=torch.float64).softmax(dim=-1)
    again = a @ pseudo_inverse(a, iterations) @ a
    assert float((again - a).norm() / a.norm()) < error


def test_the_pseudo_inverse_converges_to_the_exact_one() -> None:
    a = torch.randn(2, 3, 16, 16, dtype=torch.float64).softmax(dim=-1)
    torch.testing.assert_close(pseudo_inverse(a, 30), torch.linalg.pinv(a), rtol=1e-8, atol=1e-8)


def test_the_pseudo_inverse_of_a_matrix_does_not_depend_on_the_others() -> None:
    a = torch.randn(3, 2, 5, 5, dtype=torch.float64).mul(torch.tensor([1.0, 9.0, 0.1])[:, None, None, None]).softmax(-1)
    torch.testing.assert_close(pseudo_inverse(a, 6)[1, 1], pseudo_inverse(a[1, 1], 6), rtol=1e-12, atol=1e-12)


def test_segments_of_padding_are_no_landmarks() -> None:
    valid = torch.arange(8).expand(2, 8) < 4
    q, k, v = heads(8)
    half = landmark_attention(*(x[:, :, :4] for x in (q, k, v)), landmarks=2, iterations=6)
    out = landmark_attention(q, k, v, **OPTIONS, valid=valid)
    torch.testing.assert_close(out[:, :, :4], half, rtol=1e-10, atol=1e-10)


def test_narrow_inputs_are_computed_in_float32() -> None:
    narrow = [x.detach() for x in heads(200, dtype=torch.bfloat16)]
    expected = landmark_attention_by_matrices(*(x.double() for x in narrow), **OPTIONS)
    out = landmark_attention(*narrow, **OPTIONS)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-4)


def test_autocast_narrows_neither_values_nor_gradients() -> None:
    inputs = heads(40, dtype=torch.float32)
    expected = landmark_attention(*inputs, **OPTIONS)
    gradients = torch.autograd.grad(expected.sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = landmark_attention(*inputs, **OPTIONS)
        found = torch.autograd.grad(out.sum(), inputs)
    assert torch.equal(out, expected)
    assert all(torch.equal(one, other) for one, other in zip(found, gradients, strict=True))


def test_hardly_more_than_inputs_and_result_is_kept_for_the_backward_pass() -> None:
    inputs = heads(2000, dtype=torch.float32)
    kept = saved_bytes(lambda: landmark_attention(*inputs, **OPTIONS), [])
    log_sum_exp = 4 * 2 * 3 * 2000
    assert 0 < kept - 4 * inputs[0].nbytes - log_sum_exp < inputs[0].nbytes / 50
