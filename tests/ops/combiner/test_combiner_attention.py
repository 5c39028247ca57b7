"""Combiner: every key is attended once, directly or in one region, and the parts add up to the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from combiner_inputs import BOTH_FORMS, assert_equal, qkv
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from subquad.ops.combiner.attention import (
    Summarize,
    combiner_attention,
    combiner_attention_by_regions,
    combiner_attention_with_summaries,
)
from subquad.ops.combiner.grid import Horizontal, Rowmajor, Vertical
from subquad.ops.combiner.joint_mixture import JointMixture
from subquad.ops.combiner.levels import Logsparse
from subquad.ops.combiner.plans import Fixed, Plan

SIZES = st.sampled_from([1, 2, 3, 4, 7, 40])
PARTITIONS = st.one_of(
    st.builds(Fixed, SIZES), st.builds(Logsparse), *(st.builds(p, SIZES) for p in (Vertical, Horizontal, Rowmajor))
)
PLANS = st.one_of(PARTITIONS, st.builds(JointMixture, SIZES), st.builds(Rowmajor, SIZES, weighted_keys=st.just(False)))


@st.composite
def validities(draw: st.DrawFn, length: int) -> Tensor | None:
    """Bool (2, length), or None: padding on the right or anywhere."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    kinds = {
        "none": None,
        "right": torch.arange(length) < torch.randint(0, length + 1, (2, 1), generator=generator),
        "anywhere": torch.rand(2, length, generator=generator) < 0.6,
    }
    return kinds[draw(st.sampled_from([*kinds]))]


SUMMARIES = st.builds(
    Summarize,
    st.sampled_from(["max", "mean", "sum"]),
    st.sampled_from(["identity", "relu", "deepset"]),
    log_size=st.booleans(),
)


def weights_of(plan: Plan, length: int, *, causal: bool, summarize: Summarize | None = None) -> Tensor:
    """The attention matrices (2, length, length) of two heads: what comes out of the values 1, one token at a time."""
    q, k, _ = qkv(length, batch=1)
    q, k = (x.detach().expand(length, -1, -1, -1) for x in (q, k))
    v = torch.zeros_like(q)
    v[torch.arange(length), :, torch.arange(length)] = 1.0
    return combiner_attention(q, k, v, plan, causal=causal, summarize=summarize)[..., 0].permute(1, 2, 0)


def assert_equals_definition(
    plan: Plan, length: int, causal: bool, valid: Tensor | None, summarize: Summarize | None
) -> None:
    q, k, v = qkv(length)
    inputs = [q, k, v]
    if summarize is not None and summarize.activation == "deepset":
        inputs += [torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        summarize = replace(summarize, query_weight=inputs[3], key_weight=inputs[4])
    out = combiner_attention(q, k, v, plan, causal=causal, valid=valid, summarize=summarize)
    expected = combiner_attention_by_regions(q, k, v, plan, causal=causal, valid=valid, summarize=summarize)
    assert_equal(out, expected)
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, upstream, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected, inputs, upstream, allow_unused=True, materialize_grads=True)
    for gradient, expected_gradient in zip(found, wanted, strict=True):
        assert_equal(gradient, expected_gradient)


@given(plan=PLANS, length=st.integers(1, 40), causal=st.booleans(), data=st.data())
@settings(max_examples=80)
def test_it_equals_the_definition(plan: Plan, length: int, causal: bool, data: st.DataObject) -> None:
    causal = causal or not plan.bidirectional
    summaries = st.builds(Summarize, log_size=st.booleans()) if isinstance(plan, Rowmajor) else SUMMARIES
    summarize = data.draw(st.none() | summaries)
    assert_equals_definition(plan, length, causal, data.draw(validities(length)), summarize)


@BOTH_FORMS
@pytest.mark.parametrize("length", [2, 3, 5, 9, 17, 33, 65, 129])
def test_logsparse_has_every_level_where_the_length_is_one_more_than_a_power_of_two(length: int, causal: bool) -> None:
    assert_equals_definition(Logsparse(), length, causal, None, None)


@given(plan=PARTITIONS, length=st.integers(1, 50), causal=st.booleans())
def test_every_key_that_may_be_seen_is_in_one_place(plan: Plan, length: int, causal: bool) -> None:
    for i in range(length):
        direct, regions = plan.partition(i, length, causal=causal)
        covered = [*direct, *(j for region in regions for j in region.tokens)]
        assert sorted(covered) == list(range(i + 1 if causal else length))
        assert i in direct


@given(columns=SIZES, length=st.integers(1, 50))
def test_the_joint_mixture_sees_twice_what_is_off_the_cross(columns: int, length: int) -> None:
    for i in range(length):
        direct, regions = JointMixture(columns).partition(i, length, causal=True)
        assert sorted(direct) == [j for j in range(i + 1) if j // columns == i // columns or (i - j) % columns == 0]
        off = sorted(j for region in regions for j in region.tokens)
        assert off == sorted(2 * [j for j in range(i + 1) if j not in direct])


@given(plan=PLANS, length=st.integers(1, 40), causal=st.booleans())
def test_weights_sum_to_one_over_what_may_be_seen(plan: Plan, length: int, causal: bool) -> None:
    causal = causal or not plan.bidirectional
    weights = weights_of(plan, length, causal=causal)
    assert_equal(weights.sum(dim=-1), torch.ones(2, length, dtype=torch.float64))
    visible = torch.ones(length, length, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    assert bool((weights[:, ~visible] == 0).all())
    assert bool((weights[:, visible] > 0).all())


def test_queries_share_the_weights_inside_a_region() -> None:
    weights = weights_of(Fixed(4), 12, causal=True)[:, 8:, :4]  # four queries, one region
    inside = weights / weights.sum(dim=-1, keepdim=True)
    assert_equal(inside, inside[:, :1].expand_as(inside))


def regions_of(plan: Plan, i: int, length: int) -> tuple[list[int], list[list[int]]]:
    direct, regions = plan.partition(i, length, causal=True)
    return sorted(direct), [list(region.tokens) for region in regions]


def test_regions_of_logsparse_are_those_of_the_worked_example() -> None:
    starts = {0: [], 1: [], 2: [(0, 2)], 3: [(0, 2)], 4: [(0, 4)], 5: [(0, 4)], 6: [(4, 6), (0, 4)]}
    starts |= {7: [(4, 6), (0, 4)], 8: [(0, 8)]}
    for i, expected in starts.items():  # the token before an odd one is a region of its own, and so as good as direct
        direct, regions = regions_of(Logsparse(), i, 9)
        assert direct == ([i - 1, i] if i % 2 else [i])
        assert regions == [list(range(*ends)) for ends in expected]


def test_regions_of_the_other_plans_are_those_of_the_worked_example() -> None:
    cross = [1, 5, 8, 9]
    assert regions_of(Vertical(4), 9, 12) == (cross, [[0, 4], [2, 6], [3, 7]])
    assert regions_of(Horizontal(4), 9, 12) == (cross, [[0, 2, 3], [4, 6, 7]])
    joint = [[0, 4], [2, 6], [3, 7], [0], [4], [2, 3], [6, 7]]
    assert regions_of(JointMixture(4), 9, 12) == (cross, joint)
    assert regions_of(Fixed(4), 9, 12) == ([8, 9], [[0, 1, 2, 3], [4, 5, 6, 7]])
    direct, regions = Rowmajor(4).partition(9, 12, causal=True)
    assert direct == [8, 9]
    assert [(region.tokens, region.asking) for region in regions] == [((0, 1, 2, 3), 1), ((4, 5, 6, 7), 5)]
    for plan in (Vertical(4), Horizontal(4), JointMixture(4), Rowmajor(4)):
        assert regions_of(plan, 2, 12) == ([0, 1, 2], [])


EXACT = [
    (Fixed(1), 9),
    (Fixed(9), 9),
    (Fixed(20), 9),
    (Vertical(1), 9),
    (Vertical(9), 9),
    (Vertical(5), 9),
    (Horizontal(1), 9),
    (Horizontal(2), 9),
    (Horizontal(9), 9),
    (Rowmajor(1, weighted_keys=False), 9),
    (Rowmajor(1), 9),
    (Rowmajor(9), 9),
    (Logsparse(), 1),
    (Logsparse(), 2),
]


@BOTH_FORMS
@pytest.mark.parametrize(("plan", "length"), EXACT, ids=repr)
def test_it_is_softmax_attention_where_no_region_has_two_tokens(plan: Plan, length: int, causal: bool) -> None:
    q, k, v = qkv(length)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert_equal(combiner_attention(q, k, v, plan, causal=causal), expected)


@given(plan=PARTITIONS.filter(lambda plan: not isinstance(plan, Rowmajor)), length=st.integers(1, 40), data=st.data())
def test_with_equal_keys_and_the_logarithm_of_sizes_it_is_softmax_attention(
    plan: Plan, length: int, data: st.DataObject
) -> None:
    causal = data.draw(st.booleans())
    q, k, v = qkv(length)
    k = k[:, :, :1].expand_as(k)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    out = combiner_attention(q, k, v, plan, causal=causal, summarize=Summarize(log_size=True))
    assert_equal(out, expected)
    if length > 4 and plan == Fixed(3):
        assert not torch.allclose(combiner_attention(q, k, v, plan, causal=causal), expected)


@given(plan=PLANS, length=st.integers(2, 40), data=st.data())
def test_the_result_of_a_prefix_is_the_prefix_of_the_result(plan: Plan, length: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, length - 1))
    q, k, v = qkv(length)
    whole = combiner_attention(q, k, v, plan, causal=True)[:, :, :cut]
    alone = combiner_attention(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], plan, causal=True)
    assert_equal(alone, whole)


@given(plan=PLANS.filter(lambda plan: plan.bidirectional), length=st.integers(1, 30), padding=st.integers(1, 30))
def test_right_padding_changes_nothing_and_gets_no_gradient(plan: Plan, length: int, padding: int) -> None:
    inputs = qkv(length)
    q, k, v = (F.pad(x.detach(), (0, 0, 0, padding), value=1e3).requires_grad_() for x in inputs)
    valid = (torch.arange(length + padding) < length).expand(2, -1)
    out, alone = (
        combiner_attention(q, k, v, plan, causal=False, valid=valid),
        combiner_attention(*inputs, plan, causal=False),
    )
    assert_equal(out[:, :, :length], alone)
    assert not out[:, :, length:].any()
    upstream = torch.randn_like(out)
    wanted = torch.autograd.grad(alone, inputs, upstream[:, :, :length])
    for gradient, expected in zip(torch.autograd.grad(out, (q, k, v), upstream), wanted, strict=True):
        assert_equal(gradient[:, :, :length], expected)
        assert not gradient[:, :, length:].any()


def test_what_is_not_real_may_hold_anything() -> None:
    valid = torch.tensor([[True, False, True, True, False, True, True, False, False]])
    for plan in (Fixed(3), Logsparse(), Vertical(3), Horizontal(3), Rowmajor(3)):
        q, k, v = qkv(9, batch=1)
        hidden = ~valid[:, None, :, None]
        holes = (q.masked_fill(hidden, torch.nan), k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan))
        out = combiner_attention(*holes, plan, causal=False, valid=valid)
        expected = combiner_attention(q, k, v, plan, causal=False, valid=valid)
        assert torch.equal(out, expected)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@given(plan=PLANS, units=st.integers(1, 9), causal=st.booleans())
@example(plan=Logsparse(), units=9, causal=True)
@example(plan=Logsparse(), units=9, causal=False)
def test_pairs_are_counted_without_a_layout(plan: Plan, units: int, causal: bool) -> None:
    causal, length = causal or not plan.bidirectional, units * plan.unit(200)
    layout = plan.layout(length, causal=causal)
    attending = [*layout.parts, *([] if layout.blocks is None else [layout.blocks])]
    counted = (sum(part.pairs for part in parts) for parts in (attending, layout.summaries))
    direct, asked = set[tuple[int, int]](), set[tuple[int | None, int]]()
    for i in range(length):
        partition = plan.partition(i, length, causal=causal)
        direct |= {(i, j) for j in partition.direct}
        asked |= {(region.asking, j) for region in partition.regions for j in region.tokens}
    assert plan.pairs(length, causal=causal) == (*counted, len(direct & asked))


@given(plan=PLANS, units=st.integers(1, 9), causal=st.booleans())
def test_whether_parts_are_merged_is_the_same_at_every_length(plan: Plan, units: int, causal: bool) -> None:
    layout = plan.layout(units * plan.unit(200), causal=causal or not plan.bidirectional)
    assert plan.merges_parts == bool(layout.parts)
    assert plan.merges_parts == (layout.blocks is None)


def test_bad_arguments_are_refused() -> None:
    q, k, v = qkv(6)
    with pytest.raises(ValueError, match=r"q, k and v must be \(B, H, L, E\), all of one shape; got \(2, 2, 6, 3\), "):
        combiner_attention(q, k[:, :, :5], v, Fixed(2), causal=True)
    with pytest.raises(ValueError, match=r"valid must be bool \(2, 6\), got torch.bool \(2, 5\)"):
        combiner_attention(q, k, v, Fixed(2), causal=True, valid=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"JointMixture\(columns=2\) is causal alone; pass causal=True"):
        combiner_attention(q, k, v, JointMixture(2), causal=False)
    with pytest.raises(ValueError, match=r"Rowmajor.* pools nothing; leave reduce and activation as they are"):
        combiner_attention(q, k, v, Rowmajor(2), causal=True, summarize=Summarize("mean"))
    with pytest.raises(ValueError, match=r"'deepset' needs query_weight and key_weight of shape \(3, 3\)"):
        combiner_attention(q, k, v, Fixed(2), causal=True, summarize=Summarize("max", "deepset"))
    with pytest.raises(ValueError, match=r"expected two of 4 summaries or more, got \(2, 2, 3, 3\)"):
        combiner_attention_with_summaries(q, k, v, k[:, :, :3], v[:, :, :3], Rowmajor(2), causal=True)
    for plan, name in ((Fixed, "size"), (Vertical, "columns")):
        with pytest.raises(ValueError, match=rf"{plan.__name__}\({name}\) must be at least 1, got 0"):
            plan(0)


def test_nothing_gives_nothing() -> None:
    for shape in ((0, 2, 5, 3), (2, 0, 5, 3), (2, 2, 0, 3)):
        x = torch.zeros(shape)
        assert combiner_attention(x, x, x, Fixed(2), causal=True).shape == shape
