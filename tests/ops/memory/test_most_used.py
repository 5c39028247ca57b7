"""Usage: the attention that tokens get, against whole matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad.ops.memory import attention as memory_attention
from subquad.ops.memory.attention import Distances, VisibleColumns
from subquad.ops.memory.compressed import CompressedRows, VisibleRows, compressed_attention_by_table
from subquad.ops.memory.most_used import received_attention


def attention_by_table(
    q: Tensor, k: Tensor, distances: Distances, reach: VisibleColumns, rows: CompressedRows | None
) -> Tensor:
    """The weights (B, H, L, S) of tokens: what is read of values that are unit vectors."""
    unit = torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:2], -1, -1)
    blank = None if rows is None else rows._replace(v=unit.new_zeros(*rows.k.shape[:3], k.shape[2]))
    return compressed_attention_by_table(q, k, unit, distances, reach, None, blank)


@pytest.mark.parametrize("pairs", [1, 2**20])
@given(length=st.sampled_from([1, 5, 12]), before=st.sampled_from([0, 4]), seen=st.sampled_from([0, 3]))
def test_what_tokens_receive_is_the_sum_of_their_column(pairs: int, length: int, before: int, seen: int) -> None:
    q, k, row_k = (
        torch.randn(2, 3, count, 4, dtype=torch.float64) for count in (length, before + length, max(1, seen))
    )
    u, w, row_w = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    r, row_r = (torch.randn(3, count, 4, dtype=torch.float64) for count in (before + length, length + 4))
    first = (before + torch.arange(length)[None] - torch.tensor([[2], [7]])).clamp_min(0)
    rows, i = None, torch.arange(length)[None]
    if seen:
        sight = VisibleRows(0 * i, (i % (seen + 1)), i, 1)
        rows = CompressedRows(row_k, row_k, Distances(row_r, u, row_w), sight)
    counted = torch.rand(2, length) < 0.7
    reach, distances = VisibleColumns(first, first), Distances(r, u, w)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_attention, "SLICE_PAIRS", pairs)
        found = received_attention(q, k, distances, reach, rows, counted)
    weights = attention_by_table(q, k, distances, reach, rows) * counted[:, None, :, None]
    torch.testing.assert_close(found, weights.sum(dim=(1, 2)), rtol=1e-10, atol=1e-10)
