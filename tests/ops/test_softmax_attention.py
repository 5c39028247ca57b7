"""The definition of softmax attention: a loop over queries, rows that see nothing, narrow dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.softmax import softmax_attention, softmax_attention_with_lse


def heads(length: int, key_length: int, *, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, 3, length, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(batch, 3, key_length, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(batch, 3, key_length, 5, dtype=torch.float64, requires_grad=True)
    return q, k, v


def test_the_definition_equals_a_loop_over_queries() -> None:
    q, k, v = heads(5, 7)
    visible = torch.rand(2, 1, 5, 7) < 0.6
    out = softmax_attention(q, k, v, visible)
    for b in range(2):
        for i in range(5):
            keys = visible[b, 0, i]
            scores = k[b][:, keys] @ q[b, :, i, :, None] / 2
            expected = (scores.softmax(dim=1) * v[b][:, keys]).sum(dim=1)
            torch.testing.assert_close(out[b, :, i], expected, rtol=1e-12, atol=1e-12)


def test_the_log_sum_exp_is_that_of_the_visible_scores() -> None:
    q, k, v = heads(5, 7)
    visible = torch.rand(2, 3, 5, 7) < 0.6
    visible[0, 0, 0] = False
    _, lse = softmax_attention_with_lse(q, k, v, visible, 0.3)
    scores = (0.3 * torch.einsum("bhie,bhje->bhij", q, k)).exp() * visible
    torch.testing.assert_close(lse, scores.sum(dim=-1).log(), rtol=1e-12, atol=1e-12)
    assert bool(lse[0, 0, 0].isneginf())


def test_a_row_without_keys_gives_zero_and_sends_no_gradient() -> None:
    q, k, v = heads(3, 4)
    visible = torch.ones(3, 4, dtype=torch.bool)
    visible[1] = False
    out = softmax_attention(q, k, v, visible)
    assert not out[:, :, 1].any()
    gradients = torch.autograd.grad(out[:, :, 1].sum(), (q, k, v), retain_graph=True)
    assert not any(bool(gradient.any()) for gradient in gradients)
    of_queries = torch.autograd.grad(out.sum(), q)[0]
    assert bool(of_queries.isfinite().all())
    assert not of_queries[:, :, 1].any()


def test_narrow_inputs_are_summed_in_float32() -> None:
    q, k = torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16), torch.zeros(1, 1, 4096, 4, dtype=torch.bfloat16)
    v = torch.ones(1, 1, 4096, 4, dtype=torch.bfloat16)
    out = softmax_attention(q, k, v, torch.ones(1, 4096, dtype=torch.bool))
    assert out.dtype == torch.bfloat16
    assert bool((out == 1).all())
