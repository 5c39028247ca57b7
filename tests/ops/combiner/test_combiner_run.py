"""How Combiner runs: heads and blocks a part at a time, in other numbers and elsewhere, and what is kept."""

from __future__ import annotations

import math

import pytest
import torch
from combiner_inputs import BOTH_FORMS, assert_equal, qkv
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
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
from subquad.ops.combiner.region_pooling import first_largest
from subquad.ops.rectangles import TOKENS, Gather, Keys, Part, Queries, Source, View


@BOTH_FORMS
@pytest.mark.parametrize("log_size", [False, True])
def test_given_summaries_are_attended_as_own_ones(causal: bool, log_size: bool) -> None:
    q, k, v = qkv(11)
    rows = F.pad(torch.arange(11), (0, 1), value=-1).reshape(3, 4)
    keys, values = torch.zeros(2, 2, 12, 3).double(), torch.zeros(2, 2, 12, 3).double()
    for row in rows:
        members = row[row >= 0]
        for place, asking in zip(range(int(row[0]), int(row[0]) + 4), row, strict=True):
            query = q[:, :, asking] if asking >= 0 else torch.zeros_like(q[:, :, 0])
            weights = (torch.einsum("bhe,bhje->bhj", query, k[:, :, members]) / math.sqrt(3)).softmax(dim=-1)
            keys[:, :, place] = torch.einsum("bhj,bhje->bhe", weights, k[:, :, members])
            values[:, :, place] = torch.einsum("bhj,bhje->bhe", weights, v[:, :, members])
    given_ones = combiner_attention_with_summaries(q, k, v, keys, values, Rowmajor(4), causal=causal, log_size=log_size)
    own = combiner_attention(q, k, v, Rowmajor(4), causal=causal, summarize=Summarize(log_size=log_size))
    assert_equal(given_ones, own)
    upstream = torch.randn_like(own)
    found = torch.autograd.grad(given_ones, (q, k, v), upstream)
    wanted = torch.autograd.grad(own, (q, k, v), upstream)
    for gradient, expected in zip(found, wanted, strict=True):
        assert_equal(gradient, expected)


@pytest.mark.parametrize("plan", [Fixed(64), Logsparse(), Vertical(16), Horizontal(16), Rowmajor(16)], ids=repr)
def test_only_inputs_and_what_merging_needs_are_kept(plan: Plan) -> None:
    q, k, v = (torch.randn(1, 2, 256, 8, requires_grad=True) for _ in range(3))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        combiner_attention(q, k, v, plan, causal=True)
    result_and_sums = 8 + 1 if plan.merges_parts else 0
    assert sum(kept.values()) == 4 * 256 * 2 * (3 * 8 + result_and_sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_numbers_stay_close_to_the_definition(dtype: torch.dtype) -> None:
    q, k, v = (x.detach().to(dtype) for x in qkv(70, width=8))
    for plan in (Fixed(8), Logsparse(), Vertical(8), Horizontal(8), Rowmajor(8), JointMixture(8)):
        out = combiner_attention(q, k, v, plan, causal=True)
        exact = combiner_attention_by_regions(q.double(), k.double(), v.double(), plan, causal=True)
        assert out.dtype == dtype
        assert float((out.double() - exact).norm() / exact.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("plan", [Fixed(4), Rowmajor(4), Rowmajor(4, weighted_keys=False), Logsparse()], ids=repr)
@BOTH_FORMS
def test_a_call_in_parts_is_the_same(plan: Plan, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = qkv(22)
    whole = combiner_attention(*inputs, plan, causal=causal)
    wanted = torch.autograd.grad(whole.square().sum(), inputs)
    for module in ("blocks", "weighted_rows", "groups"):
        monkeypatch.setattr(f"subquad.ops.combiner.{module}.CALL_BYTES", 2 * 4 * 8 * 8)
    found = combiner_attention(*inputs, plan, causal=causal)
    assert_equal(found, whole)
    for gradient, expected in zip(torch.autograd.grad(found.square().sum(), inputs), wanted, strict=True):
        assert_equal(gradient, expected)


@pytest.mark.parametrize("plan", [Fixed(4), Rowmajor(4), Logsparse(), Vertical(4)], ids=repr)
@BOTH_FORMS
def test_examples_that_run_together_are_each_as_alone(plan: Plan, causal: bool) -> None:
    """Equal ones side by side and apart, shorter ones, an empty one, one with gaps; heads lie inside tokens."""
    valid = torch.arange(13) < torch.tensor([13, 13, 6, 6, 0, 13, 13])[:, None]
    valid[6, 5] = False
    q, k, v = (torch.randn(7, 13, 2, 3, dtype=torch.float64).transpose(1, 2).requires_grad_() for _ in range(3))
    upstream = torch.randn(7, 13, 2, 3, dtype=torch.float64).transpose(1, 2)
    together = combiner_attention(q, k, v, plan, causal=causal, valid=valid)
    one = [slice(i, i + 1) for i in range(7)]
    alone = [combiner_attention(q[i], k[i], v[i], plan, causal=causal, valid=valid[i]) for i in one]
    assert_equal(together, torch.cat(alone))
    wanted = torch.autograd.grad(torch.cat(alone), (q, k, v), upstream)
    for gradient, expected in zip(torch.autograd.grad(together, (q, k, v), upstream), wanted, strict=True):
        assert_equal(gradient, expected)


@pytest.mark.parametrize("size", [1, 7, 12, 16, 128])
def test_the_first_largest_is_found_where_several_are_equal(size: int) -> None:
    x = torch.randint(0, 3, (2, 3, size, 5)).double()
    values, places = first_largest(x, 2)
    assert torch.equal(values, x.amax(dim=2))
    assert torch.equal(places, (x == values[:, :, None]).int().argmax(dim=2))


def test_a_part_reads_and_adds_through_its_views() -> None:
    x = torch.arange(12.0).reshape(1, 12, 1)
    assert View(1, 3, 4, 2).of(x)[:, 0, :, 0].tolist() == [[1, 2], [5, 6], [9, 10]]
    assert View(0, 2, 1, 3, 4).of(x)[:, 0, :, 0].tolist() == [[0, 4, 8], [1, 5, 9]]
    shared, listed = View(3, 2, 0, 2), Gather(torch.tensor([[0, 1], [1, 2]]))
    total = torch.zeros(1, 12, 1)
    shared.add(total, torch.ones(2, 1, 2, 1))
    listed.add(total, torch.ones(2, 1, 2, 1))
    assert total[0, :, 0].tolist() == [1, 2, 1, 2, 2, 0, 0, 0, 0, 0, 0, 0]


def test_a_row_without_keys_gives_nothing() -> None:
    q, k, v = (torch.randn(1, 4, 3, dtype=torch.float64) for _ in range(3))
    part = Part(
        View(0, 2, 2, 2), (Keys(TOKENS, View(0, 2, 2, 2)),), torch.tensor([[False, False], [True, True]])[None, None]
    )
    queries = Queries(q, torch.zeros_like(q), torch.full_like(q[..., 0], -torch.inf))
    part = part.restrict({}, q.dtype)
    part.forward(queries, {TOKENS: Source(k, v)}, 1.0, fresh=True)
    assert queries.lse.isinf().tolist() == [[True, False, True, False]]
    assert not queries.out[:, ::2].any()


def test_the_gradient_of_softmax_that_is_private_to_torch_is_what_it_was() -> None:
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weights, grad = scores.softmax(dim=-1), torch.randn(3, 5, dtype=torch.float64)
    (expected,) = torch.autograd.grad(weights, scores, grad)
    found = torch.ops.aten._softmax_backward_data(grad, weights.detach(), -1, grad.dtype)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
