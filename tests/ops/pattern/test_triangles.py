"""Causal attention inside blocks by batched products equals the definition, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subquad.ops import pattern_attention_with_lse
from subquad.ops.pattern.example_facts import ExampleFacts
from subquad.ops.pattern.piece import Gradients, Work
from subquad.ops.pattern.triangles import triangles_backward, triangles_forward
from subquad.ops.softmax import softmax_attention_with_lse
from subquad.patterns import Block, Causal, Columns, Pattern

SCALE = 0.3
SIZES = [1, 63, 64, 65, 130]


def definition(x: list[Tensor], upstream: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Result, log-sum-exp and the gradients of a combination of both; one head for each block."""
    q, k, v = (tensor[:, None].detach().requires_grad_() for tensor in x)
    visible = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    out, lse = softmax_attention_with_lse(q, k, v, visible, SCALE)
    total = (out[:, 0] * upstream[0]).sum() + (lse[:, 0] * upstream[1]).sum()
    return out[:, 0].detach(), lse[:, 0].detach(), [grad[:, 0] for grad in torch.autograd.grad(total, (q, k, v))]


def blocks(size: int, *, large: float = 3.0) -> list[Tensor]:
    return [large * torch.randn(3, size, 6, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("large", [3.0, 100.0])
def test_results_are_those_of_the_definition(size: int, large: float) -> None:
    q, k, v = x = blocks(size, large=large)
    out, lse, _ = definition(x, (torch.zeros_like(q), torch.zeros_like(q[..., 0])))
    found, found_lse = torch.empty_like(out), torch.empty_like(lse)
    triangles_forward(Work(q, k, v, found, found_lse, ExampleFacts.nothing(), 0, SCALE, fresh=True))
    torch.testing.assert_close(found, out, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found_lse, lse, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("with_lse", [False, True])
def test_gradients_are_those_of_the_definition(size: int, fresh: bool, with_lse: bool) -> None:
    q, k, v = x = blocks(size)
    upstream = torch.randn_like(q), torch.randn_like(q[..., 0]) if with_lse else torch.zeros_like(q[..., 0])
    out, lse, expected = definition(x, upstream)
    before = [torch.randn_like(tensor) for tensor in x]
    of_q, of_k, of_v = grads = [tensor.clone() for tensor in before]
    work = Work(q, k, v, out, lse, ExampleFacts.nothing(), 0, SCALE, fresh=fresh)
    triangles_backward(work, Gradients(upstream[0], upstream[1] if with_lse else None, of_q, of_k, of_v))
    if fresh:
        before[0].zero_()
    for found, start, right in zip(grads, before, expected, strict=True):
        torch.testing.assert_close(found, start + right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pattern", [Causal() & Block(128), Causal() & (Block(128) | Columns(128, 8))])
@pytest.mark.parametrize("transposed", [False, True])
def test_patterns_with_such_blocks_equal_the_definition(
    monkeypatch: pytest.MonkeyPatch, pattern: Pattern, transposed: bool
) -> None:
    calls = []
    monkeypatch.setattr("subquad.ops.pattern.blocked.CALL_FLOPS", 2**15)
    monkeypatch.setattr(
        "subquad.ops.pattern.strip_piece.triangles_forward", lambda work: calls.append(triangles_forward(work))
    )
    shape = (1, 2100, 2, 4) if transposed else (1, 2, 2100, 4)
    x = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    q, k, v = ((tensor.transpose(1, 2) if transposed else tensor).requires_grad_() for tensor in x)
    upstream = torch.randn(1, 2, 2100, 4, dtype=torch.float64), torch.randn(1, 2, 2100, dtype=torch.float64)
    results = []
    for backend in ("blocked", "dense"):
        out, lse = pattern_attention_with_lse(q, k, v, pattern, backend=backend)
        results.append((out, lse, *torch.autograd.grad((out, lse), (q, k, v), upstream)))
    assert calls
    for found, right in zip(*results, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)


def test_a_hidden_key_whose_scores_overflow_changes_no_earlier_query() -> None:
    hidden, results = 50, []
    for size in (1.0, torch.inf):
        q, v = torch.ones(3, 64, 6), torch.arange(3.0 * 64 * 6).view(3, 64, 6)
        k = torch.linspace(-1, 1, 3 * 64 * 6).view(3, 64, 6)
        k[:, hidden] *= size
        out, lse = torch.empty(3, 64, 6), torch.empty(3, 64)
        triangles_forward(Work(q, k, v, out, lse, ExampleFacts.nothing(), 0, SCALE, fresh=True))
        results.append((out[:, :hidden], lse[:, :hidden]))
    for found, right in zip(*results, strict=True):
        assert torch.equal(found, right)
        assert found.isfinite().all()
