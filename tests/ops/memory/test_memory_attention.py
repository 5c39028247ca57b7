"""Attention with memory and distances: the fast form against the definition, and its parts against plain sentences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad.ops.memory import attention as module
from subquad.ops.memory.attention import (
    Distances,
    Memory,
    VisibleColumns,
    memory_attention,
    memory_attention_by_table,
    project_memory,
)
from subquad.ops.memory.sinusoids import distance_sinusoids

SEGMENTS = st.sampled_from([1, 3, 8, 100])


def random_inputs(length: int, before: int, count: int) -> list[Tensor]:
    """Queries, keys, values, distances and both biases, in float64."""
    shapes = ((2, 3, length, 4), (2, 3, before + length, 4), (2, 3, before + length, 4), (3, count, 4), (3, 4), (3, 4))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def random_reach(length: int, before: int, segment: int, memory: int) -> VisibleColumns:
    """Two rows whose segments begin in different places."""
    columns = before + torch.arange(length)
    own = columns - (columns + torch.tensor([[0], [2]])) % segment
    return VisibleColumns((own - memory).clamp_min(0), own.clamp_min(0))


@pytest.mark.parametrize("pairs", [1, 300, 2**20])
@pytest.mark.parametrize("apart", [True, False])
@given(
    length=st.sampled_from([1, 2, 7, 20]),
    before=st.sampled_from([0, 1, 9]),
    count=st.sampled_from([1, 3, 29]),
    segment=SEGMENTS,
    memory=st.sampled_from([0, 1, 5, 100]),
)
def test_it_equals_the_definition_whatever_is_held_at_a_time(
    pairs: int, apart: bool, length: int, before: int, count: int, segment: int, memory: int
) -> None:
    leaves, reach = random_inputs(length, before, count), random_reach(length, before, segment, memory)
    past = [leaf.detach().clone().requires_grad_() for leaf in leaves[1:3]] if apart else []
    results = []
    for attend in (memory_attention, memory_attention_by_table):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "SLICE_PAIRS", pairs)
            q, k, v, *distances = leaves
            out = attend(q, k, v, Distances(*distances), reach, Memory(*past) if apart else None)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append((out, *torch.autograd.grad((out * weights).sum(), [*leaves, *past])))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_scores_are_the_four_terms_of_the_paper() -> None:
    q, k, v, r, u, w = (tensor.detach() for tensor in random_inputs(5, 3, 8))
    out = memory_attention(q, k, v, Distances(r, u, w), VisibleColumns(*2 * [torch.zeros(1, 5, dtype=torch.int64)]))
    for b, h, i in ((0, 0, 0), (1, 2, 3), (0, 1, 4)):
        scores = []
        for j in range(3 + i + 1):
            terms = (q[b, h, i] @ k[b, h, j], q[b, h, i] @ r[h, 3 + i - j], u[h] @ k[b, h, j], w[h] @ r[h, 3 + i - j])
            scores.append(sum(terms) / 2)
        expected = torch.stack(scores).softmax(dim=0) @ v[b, h, : 3 + i + 1]
        torch.testing.assert_close(out[b, h, i], expected, rtol=1e-12, atol=1e-12)


def test_memory_gets_its_gradient_apart_and_the_own_segment_none_of_it() -> None:
    q, k, v, *distances = random_inputs(4, 4, 8)
    past = [tensor.detach().clone().requires_grad_() for tensor in (k, v)]
    own = torch.tensor([[4, 4, 6, 6]])  # two segments of two, and a memory of four
    out = memory_attention(q, k, v, Distances(*distances), VisibleColumns(own - 4, own), Memory(*past))
    gradients = torch.autograd.grad(out.square().sum(), [k, v, *past])
    moved = [gradient.abs().sum(dim=(0, 1, 3)).bool().tolist() for gradient in gradients]
    assert moved[0] == moved[1] == [False] * 4 + [True] * 4
    assert moved[2] == moved[3] == [True] * 6 + [False] * 2


@pytest.mark.parametrize("bias", [True, False])
def test_a_projection_of_memory_reaches_the_weights_and_not_the_input(bias: bool) -> None:
    layer = torch.nn.Linear(3, 5, bias=bias).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    again = project_memory(layer(x), x, layer.weight, layer.bias)
    assert torch.equal(again, layer(x))
    upstream = torch.randn_like(again)
    found = torch.autograd.grad((again * upstream).sum(), [x, *layer.parameters()], allow_unused=True)
    expected = torch.autograd.grad((layer(x.detach()) * upstream).sum(), list(layer.parameters()))
    assert found[0] is None
    for gradient, wanted in zip(found[1:], expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_narrow_numbers_are_computed_wide() -> None:
    narrow = [tensor.detach().bfloat16() for tensor in random_inputs(30, 10, 41)]
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        q, k, v, *distances = (tensor.to(dtype) for tensor in narrow)
        results.append(memory_attention(q, k, v, Distances(*distances), random_reach(30, 10, 8, 5)))
    assert results[0].dtype == torch.bfloat16
    torch.testing.assert_close(results[0], results[1].bfloat16(), rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("width", [1, 4, 7])
def test_sines_come_first_and_then_cosines(width: int) -> None:
    table, sines = distance_sinusoids(300, width, device=torch.device("cpu"), dtype=torch.float64), -(-width // 2)
    for distance, channel in ((0, 0), (1, width - 1), (299, width // 2)):
        function, n = (math.sin, channel) if channel < sines else (math.cos, channel - sines)
        assert table[distance, channel].item() == pytest.approx(function(distance * 10_000 ** (-2 * n / width)))


def test_far_distances_differ_in_narrow_numbers_too() -> None:
    exact = distance_sinusoids(4000, 8, device=torch.device("cpu"), dtype=torch.float64)
    narrow = distance_sinusoids(4000, 8, device=torch.device("cpu"), dtype=torch.bfloat16)
    torch.testing.assert_close(narrow, exact.bfloat16(), rtol=0, atol=0)
