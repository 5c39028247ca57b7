"""Relative positions: the ids of the distances, and the fast form against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad.ops import global_local
from subquad.ops.global_local import RelativeTable, distance_ids, global_local_attention, global_local_attention_by_ids


def random_inputs(length: int, num_global: int, radius: int | None, max_distance: int) -> list[Tensor]:
    """Queries, keys, values, and the two parts of a table, in float64."""
    rows = num_global if radius is None else length - num_global
    shapes = ((2, 3, rows, 4), (2, 3, length, 4), (2, 3, length, 4), (3, 2 * max_distance + 2, 4))
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in (*shapes, (3, 2 * max_distance + 2))]
    return [tensor.requires_grad_() for tensor in tensors]


def test_ids_are_those_of_the_official_code() -> None:
    places = torch.arange(5)
    assert distance_ids(places - places[:, None], 2).tolist() == [
        [0, 1, 2, 2, 2],
        [3, 0, 1, 2, 2],
        [4, 3, 0, 1, 2],
        [4, 4, 3, 0, 1],
        [4, 4, 4, 3, 0],
    ]
    assert distance_ids(places - 2, 0).tolist() == [0] * 5


def test_the_bias_is_divided_by_the_root_of_the_width_too() -> None:
    q = k = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    v = torch.eye(2, 4, dtype=torch.float64)[None, None]
    biases = torch.tensor([[0.0, 3.0, 5.0, 7.0]], dtype=torch.float64)  # the token itself, right, left, other stream
    table = RelativeTable(torch.zeros(1, 4, 4, dtype=torch.float64), biases)
    out = global_local_attention(q, k, v, table, torch.ones(1, 2, dtype=torch.bool), num_global=2, radius=None)
    expected = torch.tensor([[0.0, 1.5], [2.5, 0.0]], dtype=torch.float64).softmax(dim=-1)
    torch.testing.assert_close(out[0, 0, :, :2], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("elements", [2**22, 2000])
@given(
    sizes=st.sampled_from([(1, 1), (2, 1), (9, 2), (34, 3), (101, 5), (130, 64)]),
    radius=st.sampled_from([None, 0, 1, 7, 40, 300]),
    max_distance=st.sampled_from([1, 2, 12]),
    kept=st.sampled_from([1.0, 0.7, 0.0]),
)
def test_it_equals_the_definition_whatever_is_held_at_a_time(
    elements: int, sizes: tuple[int, int], radius: int | None, max_distance: int, kept: float
) -> None:
    length, num_global = sizes
    leaves = random_inputs(length, num_global, radius, max_distance)
    key_valid, results = torch.rand(2, length) < kept, []
    for attend in (global_local_attention, global_local_attention_by_ids):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(global_local, "SCORE_ELEMENTS", elements)
            q, k, v, *table = leaves
            out = attend(q, k, v, RelativeTable(*table), key_valid, num_global=num_global, radius=radius)
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            scalar = (out * weights).sum()
            results.append((out, *torch.autograd.grad(scalar, leaves, allow_unused=True, materialize_grads=True)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("radius", [None, 5])
def test_narrow_numbers_are_computed_wide(radius: int | None) -> None:
    leaves = [tensor.detach().bfloat16() for tensor in random_inputs(60, 4, radius, 3)]
    options: dict[str, Any] = {"num_global": 4, "radius": radius}
    key_valid = torch.ones(2, 60, dtype=torch.bool)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        q, k, v, *table = (tensor.to(dtype) for tensor in leaves)
        results.append(global_local_attention(q, k, v, RelativeTable(*table), key_valid, **options))
    assert results[0].dtype == torch.bfloat16
    torch.testing.assert_close(results[0], results[1].bfloat16(), rtol=0.01, atol=1e-6)
