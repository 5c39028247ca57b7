"""The backward pass by products equals autograd through the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subquad.ops.pattern.example_facts import ExampleFacts
from subquad.ops.pattern.piece import Gradients, Work
from subquad.ops.pattern.unfused import add_unfused
from subquad.ops.softmax import softmax_attention_with_lse

SCALE = 0.3


def definition(x: list[Tensor], shown: Tensor, weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Result, log-sum-exp and the gradients of a random combination of both; one head for each rectangle."""
    q, k, v = (tensor[:, None].requires_grad_() for tensor in x)
    out, lse = softmax_attention_with_lse(q, k, v, shown[:, None], SCALE)
    total = (out[:, 0] * weights[0]).sum() + (lse[:, 0] * weights[1]).sum()
    grads = torch.autograd.grad(total, (q, k, v))
    return out[:, 0].detach(), lse[:, 0].detach(), [grad[:, 0] for grad in grads]


@pytest.mark.parametrize("tile", [(1024, 2**18), (5, 40)])
@pytest.mark.parametrize("masks", [0, 1, 3])
@pytest.mark.parametrize("fresh", [False, True])
def test_gradients_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int], masks: int, fresh: bool
) -> None:
    monkeypatch.setattr("subquad.ops.pattern.unfused.TILE_ROWS", tile[0])
    monkeypatch.setattr("subquad.ops.pattern.unfused.TILE_PAIRS", tile[1])
    x = [3 * torch.randn(3, size, 6, dtype=torch.float64) for size in (12, 21, 21)]
    shown = torch.ones(3, 12, 21, dtype=torch.bool)
    if masks:
        shown = (torch.rand(masks, 12, 21) < 0.6).expand(3, 12, 21).clone()
        shown[:, :, 0] = True
    weights = torch.randn(3, 12, 6, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    out, lse, expected = definition(x, shown, weights)
    q, k, v = x
    work = Work(q.detach(), k.detach(), v.detach(), out, lse, ExampleFacts.nothing(), 0, SCALE, fresh=fresh)
    before = [torch.randn_like(tensor) for tensor in x]
    of_q, of_k, of_v = grads = [tensor.clone() for tensor in before]
    visible = shown[:masks].double().mT.contiguous() if masks else None
    add_unfused(work, Gradients(weights[0], weights[1], of_q, of_k, of_v), visible)
    if fresh:
        before[0].zero_()
    for found, start, right in zip(grads, before, expected, strict=True):
        torch.testing.assert_close(found, start + right, rtol=1e-10, atol=1e-10)


def test_scores_far_below_the_log_sum_exp_vanish_without_harm() -> None:
    q, k = torch.tensor([[[30.0]]]), torch.tensor([[[30.0], [-30.0]]])
    v = torch.tensor([[[1.0], [-1.0]]])
    out, lse, expected = definition([q, k, v], torch.ones(1, 1, 2, dtype=torch.bool), (torch.ones(1), torch.zeros(1)))
    of_q, of_k, of_v = grads = [torch.zeros_like(x) for x in (q, k, v)]
    work = Work(q.detach(), k.detach(), v.detach(), out, lse, ExampleFacts.nothing(), 0, SCALE, fresh=False)
    add_unfused(work, Gradients(torch.ones(1, 1, 1), None, of_q, of_k, of_v), None)
    for found, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
