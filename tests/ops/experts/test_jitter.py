"""A router's logits with noise: the fast form against the definition, and what the noise is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subquad.ops.experts import jitter
from subquad.ops.experts.jitter import draw_levels, jittered, jittered_logits, jittered_logits_at_once


@given(
    shape=st.sampled_from([(0, 3), (1, 1), (7, 3), (2, 9, 5)]), experts=st.integers(1, 4), slice_of=st.integers(1, 40)
)
def test_it_equals_the_definition(shape: tuple[int, ...], experts: int, slice_of: int) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(experts, shape[-1], dtype=torch.float64, requires_grad=True)
    levels, upstream = draw_levels(x), torch.randn(*shape[:-1], experts, dtype=torch.float64)
    expected = jittered_logits_at_once(x, weight, levels, 0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jitter, "SLICE", slice_of)
        found = jittered_logits(x, weight, levels, 0.3)
        gradients = torch.autograd.grad(found, [x, weight], upstream)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, [x, weight], upstream), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-10)


def test_the_noise_is_uniform_around_one_and_independent() -> None:
    factors = jittered(torch.ones(1000, 100), draw_levels(torch.ones(1000, 100)), 0.5)
    assert 0.5 <= float(factors.min()) < 0.501
    assert 1.499 < float(factors.max()) <= 1.5
    counts = torch.histc(factors, bins=10, min=0.5, max=1.5)
    assert float((counts / 10_000 - 1).abs().max()) < 0.05
    centred = factors.flatten() - 1
    for distance in (1, 2, 3, 4, 100):
        correlation = (centred[distance:] * centred[:-distance]).mean() / centred.square().mean()
        assert abs(float(correlation)) < 0.02


def test_the_same_seed_gives_the_same_noise() -> None:
    x = torch.zeros(5, 7)
    drawn = [(torch.manual_seed(3), draw_levels(x))[1] for _ in range(2)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], draw_levels(x))


def test_it_is_in_float32_under_autocast_and_for_narrow_tokens() -> None:
    x, weight = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in [(4, 6), (3, 6)])
    levels = draw_levels(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = jittered_logits(x, weight, levels, 0.1)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, jittered(x.float(), levels, 0.1) @ weight.float().T)
    logits.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
