"""Rotary positions: products depend on distances, lengths are kept, position 0 changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subquad.build import build_mixer
from subquad.ops.rotary import rotate


def at(x: torch.Tensor, position: int) -> torch.Tensor:
    return rotate(x, torch.full(x.shape[:1] + x.shape[2:3], position))


@given(first=st.integers(0, 10_000), distance=st.integers(-50, 50), shift=st.integers(0, 100_000))
def test_a_product_depends_on_the_distance_alone(first: int, distance: int, shift: int) -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    here = (at(q, first) * at(k, first + distance)).sum()
    there = (at(q, first + shift) * at(k, first + shift + distance)).sum()
    torch.testing.assert_close(here, there, rtol=0, atol=1e-7)


def test_lengths_are_kept_and_position_zero_changes_nothing() -> None:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    positions = torch.randint(0, 1000, (2, 5))
    torch.testing.assert_close(rotate(x, positions).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x, torch.zeros(2, 5, dtype=torch.int64)), x)


def test_it_is_a_rotation_of_pairs_by_the_position_times_the_frequency() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).view(1, 1, 1, 4)
    fast, slow = torch.tensor(3.0).double(), torch.tensor(3.0 / 100).double()
    expected = torch.stack(
        (
            1 * fast.cos() - 3 * fast.sin(),
            2 * slow.cos() - 4 * slow.sin(),
            1 * fast.sin() + 3 * fast.cos(),
            2 * slow.sin() + 4 * slow.cos(),
        )
    )
    torch.testing.assert_close(rotate(x, torch.tensor([[3]]))[0, 0, 0], expected)


def test_far_positions_are_exact_in_narrow_dtypes() -> None:
    x = torch.ones(1, 1, 1, 8, dtype=torch.bfloat16)
    rotated = rotate(x, torch.tensor([[100_001]]))
    assert rotated.dtype == torch.bfloat16
    torch.testing.assert_close(rotated.double(), at(x.double(), 100_001), rtol=0.01, atol=0.01)


def test_an_odd_head_width_is_refused() -> None:
    with pytest.raises(ValueError, match="positions='rotary' needs an even head_dim, got 3"):
        build_mixer("full", embed_dim=6, num_heads=2, positions="rotary")
