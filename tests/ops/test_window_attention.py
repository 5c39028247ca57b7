"""Windowed attention in blocks equals its definition by a mask, in values and all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad.ops.window import (
    ExtraKeys,
    Window,
    window_attention,
    window_attention_by_mask,
    window_cost,
    window_sides,
)


@st.composite
def windows(draw: st.DrawFn, length: int) -> Window:
    left, right = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    share = draw(st.sampled_from([0.0, 0.7, 1.0]))
    window = Window(left, right, torch.rand(2, left + length, generator=generator) <= share)
    if draw(st.booleans()):
        segments = (torch.rand(2, left + length, generator=generator) < 0.2).cumsum(dim=1)
        window = window._replace(query_segments=segments[:, left:], key_segments=segments)
    return window


@given(length=st.sampled_from([1, 2, 31, 32, 33, 65]), extra=st.integers(0, 3), data=st.data())
def test_blocks_equal_the_definition(length: int, extra: int, data: st.DataObject) -> None:
    window = data.draw(windows(length))
    shape = (2, 2, length, 4)
    q = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, window.left + length, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    leaves: list[Tensor] = [q, k, v]
    more = None
    if extra:
        keys, values = (torch.randn(2, 2, extra, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        more = ExtraKeys(keys, values, torch.rand(2, length, extra) < 0.5)
        leaves += [keys, values]
    out, expected = window_attention(q, k, v, window, more), window_attention_by_mask(q, k, v, window, more)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(out)
    pairs = (torch.autograd.grad((y * weights).sum(), leaves) for y in (out, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_query_that_sees_nothing_gives_zero() -> None:
    q = torch.randn(1, 1, 5, 4)
    window = Window(1, 0, torch.tensor([[False, False, False, True, True, True]]))
    out = window_attention(q, torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 4), window)
    assert not out[:, :, :2].any()
    assert bool(out[:, :, 2:].any(dim=-1).all())


def test_memory_for_the_backward_pass_is_linear_in_the_length_and_has_no_window_in_it() -> None:
    once, twice = (window_cost(length, 64, 64, 8, 4).activation_bytes for length in (4096, 8192))
    assert twice == once  # beyond q, k and v themselves: what fills up a block, and columns before the sequence
    assert window_cost(0, 64, 64, 8, 4).flops == 0


@pytest.mark.parametrize(("window", "causal", "sides"), [(1, False, (0, 0)), (5, False, (2, 2)), (4, True, (3, 0))])
def test_the_window_counts_the_keys_itself_included(window: int, causal: bool, sides: tuple[int, int]) -> None:
    assert window_sides("x", window, causal=causal) == sides


def test_an_even_two_sided_window_names_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"^mine: .* must be odd; got 8, use 7 or 9$"):
        window_sides("mine", 8, causal=False)
