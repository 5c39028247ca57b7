"""Means over keys and positions equal their definition, in values and all gradients, whatever way they are summed."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad.ops.means import pair_means, running_means, strip_geometry
from subquad.ops.means.biased_means import biased_means, biased_means_by_pairs
from subquad.ops.means.far_means import Far
from subquad.ops.means.gated import SavedMeans
from subquad.ops.means.position_bias import FactorisedBias, KernelBias, PositionBias
from subquad.ops.means.strip_geometry import BiasReach, count_pairs, strips, together
from subquad.ops.means.strip_means import Tokens, strip_means
from subquad.ops.means.weighted_columns import Columns, column_groups

LENGTHS = st.sampled_from([1, 2, 5, 8, 17, 40])


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, dtype=torch.float64)).requires_grad_()


def assert_equal_to_the_definition(
    qkv: tuple[Tensor, Tensor, Tensor], bias: PositionBias | None, reach: BiasReach, *, chunk: int = 4
) -> None:
    leaves = [*qkv, *(() if bias is None else bias.tensors)]
    with (
        patch.object(running_means, "CHUNK", chunk),
        patch.object(strip_geometry, "SHORTEST", 2),
        patch.object(strip_geometry, "LONGEST", 8),
        patch.object(strip_geometry, "WHOLE", 2),
        patch.object(pair_means, "PAIRS", 2**8),
    ):
        y, expected = biased_means(*qkv, bias, reach), biased_means_by_pairs(*qkv, bias, reach)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        weights = torch.randn_like(expected)
        found, wanted = (torch.autograd.grad((out * weights).sum(), leaves) for out in (y, expected))
    for gradient, expected_gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


@st.composite
def tensors(draw: st.DrawFn, length: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with keys of a channel or of a group, ordinary ones or such that lie far apart."""
    groups, shared = draw(st.sampled_from([(1, False), (2, True)]))
    k = leaf(2, groups, columns, 1 if shared else 3, scale=draw(st.sampled_from([1.0, 500.0])))
    return leaf(2, groups, length, 3), k, leaf(2, groups, columns, 3)


@given(length=LENGTHS, more=st.integers(0, 7), left=st.sampled_from([None, 0, 1, 4, 30]), data=st.data())
def test_causal_means_with_factors(length: int, more: int, left: int | None, data: st.DataObject) -> None:
    batch = data.draw(st.sampled_from([1, 2]))
    bias = FactorisedBias(leaf(batch, length, 2), leaf(batch, length + more, 2))
    assert_equal_to_the_definition(data.draw(tensors(length, length + more)), bias, BiasReach(left, 0, True))


@given(length=LENGTHS, side=st.sampled_from([None, 0, 1, 4, 30]), data=st.data())
def test_two_sided_means_with_factors(length: int, side: int | None, data: st.DataObject) -> None:
    bias = FactorisedBias(leaf(1, length, 2), leaf(1, length, 2))
    assert_equal_to_the_definition(data.draw(tensors(length, length)), bias, BiasReach(side, side, False))


@given(length=LENGTHS, side=st.integers(0, 6), causal=st.booleans(), data=st.data())
def test_means_with_kernels(length: int, side: int, causal: bool, data: st.DataObject) -> None:
    qkv = data.draw(tensors(length, length))
    right = 0 if causal else side
    bias = KernelBias(leaf(qkv[0].shape[1], side + right + 1), side)
    assert_equal_to_the_definition(qkv, bias, BiasReach(side, right, causal))


@given(length=LENGTHS, width=st.integers(1, 7), half=st.integers(0, 2), data=st.data())
def test_means_with_kernels_on_a_grid(length: int, width: int, half: int, data: st.DataObject) -> None:
    qkv, reach = data.draw(tensors(length, length)), half * (width + 1)
    bias = KernelBias(leaf(qkv[0].shape[1], (2 * half + 1) ** 2), half, width)
    assert_equal_to_the_definition(qkv, bias, BiasReach(reach, reach, False))


@given(length=LENGTHS, more=st.integers(0, 7), causal=st.booleans(), chunk=st.integers(2, 9), data=st.data())
def test_means_without_a_bias(length: int, more: int, causal: bool, chunk: int, data: st.DataObject) -> None:
    columns = length + more if causal else length
    assert_equal_to_the_definition(data.draw(tensors(length, columns)), None, BiasReach(0, 0, causal), chunk=chunk)


@given(length=LENGTHS, chunk=st.integers(2, 9), scale=st.sampled_from([1.0, 500.0]))
def test_running_means_equal_the_definition(length: int, chunk: int, scale: float) -> None:
    log_weights, values = leaf(2, 1, length, 3, scale=scale).detach(), leaf(2, 1, length, 3).detach()
    with patch.object(running_means, "CHUNK", chunk):
        found = running_means.running_means(log_weights, values)
    expected = running_means.running_means_by_tokens(log_weights, values)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reach", [BiasReach(3, 0, True), BiasReach(2, 1, False), BiasReach(0, 0, False)])
def test_strips_of_one_size_are_handled_together(reach: BiasReach) -> None:
    with patch.object(strip_geometry, "SHORTEST", 4), patch.object(strip_geometry, "WHOLE", 2):
        singles = strips(38, 38, reach)
    several = together(singles)
    assert sum(len(some.numbers) for some in several) == len(singles) > len(several)
    assert [strip for some in several for strip in some.singles()] == singles
    x = torch.randn(1, 1, 38, 2)
    for some in several:
        assert some.pairs == sum(strip.pairs for strip in some.singles())
        for i, strip in enumerate(some.singles()):
            assert torch.equal(some.of_queries(x)[:, :, i], x[:, :, strip.queries])
            assert torch.equal(some.of_columns(x)[:, :, i], x[:, :, strip.columns])


@given(length=st.integers(0, 5000), left=st.integers(0, 700), right=st.integers(0, 700), causal=st.booleans())
def test_pairs_are_counted_as_they_are_listed(length: int, left: int, right: int, causal: bool) -> None:
    reach = BiasReach(left, 0 if causal else right, causal)
    assert count_pairs(length, reach) == sum(strip.pairs for strip in strips(length, length, reach))


def takes_products(tokens: Tokens, reach: BiasReach) -> bool:
    (strip,) = strips(20, 20, reach)
    (group,) = column_groups(tokens.k, [strip])
    columns = Columns.weigh(tokens.k, tokens.v, group)
    result = SavedMeans(torch.empty_like(tokens.k), torch.empty_like(tokens.v))
    (summed,) = strip_means(tokens, strip, columns, Far(None, None), result)
    return summed.top is not None


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_not_a_bit_of_a_running_mean_depends_on_later_tokens(scale: float) -> None:
    k, v = scale * torch.randn(1, 1, 600, 8), torch.randn(1, 1, 600, 8)
    before = running_means.running_means(k, v)
    k[:, :, 321:] += 1e4
    v[:, :, 321:] = torch.nan
    after = running_means.running_means(k, v)
    assert torch.equal(before.total[:, :, :321], after.total[:, :, :321])
    assert torch.equal(before.mean[:, :, :321], after.mean[:, :, :321])


def test_ordinary_keys_take_products_and_keys_far_apart_pairs() -> None:
    k, v = torch.randn(1, 1, 20, 3), torch.randn(1, 1, 20, 3)
    tokens = Tokens(k, v, FactorisedBias(torch.randn(1, 20, 2), torch.randn(1, 20, 2)))
    assert takes_products(tokens, BiasReach(None, 0, True))
    k[:, :, 15] = 200
    assert not takes_products(tokens, BiasReach(None, 0, True))
    assert takes_products(tokens, BiasReach(None, None, False))


def test_neighbouring_strips_share_weights_while_keys_do_not_rise_far() -> None:
    """Strips of 8 queries, 8 columns wide for the first and 16 for the others."""
    k = torch.randn(1, 1, 64, 3)
    with patch.object(strip_geometry, "SHORTEST", 8), patch.object(strip_geometry, "LONGEST", 8):
        singles = strips(64, 64, BiasReach(4, 0, True))
    ordinary = [group.queries for group in column_groups(k, singles)]
    k[:, :, 20, 1] = 50
    apart = [group.queries for group in column_groups(k, singles)]
    assert (ordinary, apart) == ([slice(0, 32), slice(32, 64)], [slice(0, 16), slice(16, 64)])


@pytest.mark.parametrize("left", [None, 3])
def test_places_without_a_key_change_nothing(left: int | None) -> None:
    q, k, v = (torch.randn(1, 1, 9, 3) for _ in range(3))
    bias, reach = FactorisedBias(torch.randn(1, 9, 2), torch.randn(1, 9, 2)), BiasReach(left, 0, True)
    k[:, :, 6:] = running_means.LOG_ZERO
    y = biased_means(q, k, v, bias, reach)
    short = FactorisedBias(bias.rows[:, :6], bias.columns[:, :6])
    torch.testing.assert_close(y[:, :, :6], biased_means(q[:, :, :6], k[:, :, :6], v[:, :, :6], short, reach))
    assert bool(y.isfinite().all())
