"""Attention to tokens and rows: the fast form against the definition, and what a query sees of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad.ops.memory import compressed as module
from subquad.ops.memory.attention import (
    Distances,
    Memory,
    VisibleColumns,
    memory_attention_with_lse,
    memory_scores_by_table,
)
from subquad.ops.memory.compressed import (
    CompressedRows,
    VisibleRows,
    compressed_attention,
    compressed_attention_by_table,
)


def leaves_of(length: int, before: int, rows: int) -> list[Tensor]:
    """Queries, keys, values, distances; rows' keys and values, r' and w'; in float64."""
    columns = before + length
    shapes = [(2, 3, length, 4), (2, 3, columns, 4), (2, 3, columns, 4), (3, columns, 4), (3, 4), (3, 4)]
    shapes += [(2, 3, rows, 4), (2, 3, rows, 4), (3, 2 * rows + length + 3, 4), (3, 4)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def random_sight(length: int, rows: int, most: int, step: int) -> VisibleRows:
    """Two examples that see more rows as time goes on, the second none at first."""
    i = torch.arange(length)
    stop = ((i // 3)[None] + torch.tensor([[1], [0]])).clamp_max(rows)
    return VisibleRows((stop - most).clamp_min(0), stop, torch.stack((i % 3, i % 3 + 2)), step)


@pytest.mark.parametrize("pairs", [1, 300, 2**20])
@given(
    length=st.sampled_from([1, 2, 7, 20]),
    before=st.sampled_from([0, 5]),
    rows=st.sampled_from([1, 4, 9]),
    most=st.sampled_from([0, 2, 100]),
    step=st.sampled_from([1, 2]),
    apart=st.booleans(),
)
def test_it_equals_the_definition_whatever_is_held_at_a_time(
    pairs: int, length: int, before: int, rows: int, most: int, step: int, apart: bool
) -> None:
    leaves = leaves_of(length, before, rows)
    past = [leaf.detach().clone().requires_grad_() for leaf in leaves[1:3]] if apart else []
    own = before + torch.arange(length)[None] - torch.arange(length)[None] % 3
    reach, results = VisibleColumns((own - 2).clamp_min(0), own), []
    for attend in (compressed_attention, compressed_attention_by_table):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "SLICE_PAIRS", pairs)
            q, k, v, r, u, w, row_k, row_v, row_r, row_w = leaves
            seen = CompressedRows(row_k, row_v, Distances(row_r, u, row_w), random_sight(length, rows, most, step))
            out = attend(q, k, v, Distances(r, u, w), reach, Memory(*past) if apart else None, seen)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append((out, *torch.autograd.grad((out * weights).sum(), [*leaves, *past])))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_log_sum_exp_is_that_of_the_scores_and_has_a_gradient() -> None:
    leaves = leaves_of(6, 4, 1)[:6]
    q, k, v, *distances = leaves
    reach = VisibleColumns(torch.tensor([[0, 1, 2, 3, 4, 5]]), torch.tensor([[4, 4, 4, 7, 7, 7]]))
    found = memory_attention_with_lse(q, k, v, Distances(*distances), reach)[1]
    expected = memory_scores_by_table(q, k, Distances(*distances), reach)[0].logsumexp(dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(lse.square().sum(), [q, k, *distances]) for lse in (found, expected))
    for gradient, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-10)


def test_a_query_sees_its_range_of_rows_at_their_distances() -> None:
    """Nothing but positions: the score of a row is its distance's."""
    length, rows = 2, 3
    q, k, v = (torch.zeros(1, 1, count, 1, dtype=torch.float64) for count in (length, length, length))
    row_v = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64).view(1, 1, rows, 1)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    r = torch.arange(9.0, dtype=torch.float64).clamp_min(1).view(1, 9, 1).log()
    sight = VisibleRows(torch.tensor([[0, 1]]), torch.tensor([[2, 3]]), torch.tensor([[1, 2]]), 3)
    seen = CompressedRows(torch.zeros_like(row_v), row_v, Distances(r, zero, one), sight)
    reach = VisibleColumns(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    out = compressed_attention(q, k, v, Distances(r[:, :1] * 0, zero, zero), reach, None, seen)
    shares = [(7 * 1 + 4 * 10) / (7 + 4 + 1), (8 * 10 + 5 * 100) / (8 + 5 + 1)]  # distances 1 + 6, 1 + 3; 2 + 6, 2 + 3
    torch.testing.assert_close(out.flatten(), torch.tensor(shares, dtype=torch.float64))


def test_narrow_numbers_are_computed_wide() -> None:
    narrow = [leaf.detach().bfloat16() for leaf in leaves_of(30, 10, 9)]
    reach, results = VisibleColumns(torch.zeros(1, 30, dtype=torch.int64), torch.zeros(1, 30, dtype=torch.int64)), []
    for dtype in (torch.bfloat16, torch.float64):
        q, k, v, r, u, w, row_k, row_v, row_r, row_w = (tensor.to(dtype) for tensor in narrow)
        seen = CompressedRows(row_k, row_v, Distances(row_r, u, row_w), random_sight(30, 9, 100, 1))
        results.append(compressed_attention(q, k, v, Distances(r, u, w), reach, None, seen))
    assert results[0].dtype == torch.bfloat16
    torch.testing.assert_close(results[0], results[1].bfloat16(), rtol=0.02, atol=5e-3)
