"""FlexAttention on a GPU, forward and backward, against the definition; what the CPU can't show of it."""

from __future__ import annotations

import pytest
import torch
from long_patterns import LONG
from torch import Tensor

from subquad import Mask
from subquad.ops import pattern_attention, pattern_attention_with_lse
from subquad.patterns import Causal, Pattern, Window

pytestmark = pytest.mark.cuda

FACTS = ("nothing", "padding", "documents", "global tokens")


def tensors(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, 2, length, 32, dtype=dtype, device="cuda", requires_grad=True) for _ in range(3))
    return q, k, v


def mask_of(fact: str, length: int) -> Mask | None:
    position = torch.arange(length, device="cuda")
    return {
        "nothing": None,
        "padding": Mask(position < torch.tensor([[length - 100], [length]], device="cuda")),
        "documents": Mask(segments=(position // 300).expand(2, -1)),
        "global tokens": Mask(global_tokens=(position % 400 == 7).expand(2, -1)),
    }[fact]


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("name", LONG)
def test_values_and_gradients_are_those_of_the_definition(name: str, fact: str) -> None:
    q, k, v = tensors(1100)
    wide_q, wide_k, wide_v = (tensor.detach().double().requires_grad_() for tensor in (q, k, v))
    mask = mask_of(fact, 1100)
    expected, expected_lse = pattern_attention_with_lse(wide_q, wide_k, wide_v, LONG[name], mask=mask, backend="dense")
    found, lse = pattern_attention_with_lse(q, k, v, LONG[name], mask=mask)
    seen = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    weights, lse_weights = torch.randn_like(expected), torch.randn_like(expected_lse)

    def total(out: Tensor, lse: Tensor) -> Tensor:
        return (out * weights).sum() + (lse.masked_fill(~seen, 0.0) * lse_weights).sum()

    assert relative_error(found, expected) < 1e-3
    assert relative_error(lse[seen], expected_lse[seen]) < 1e-3
    right = torch.autograd.grad(total(expected, expected_lse), (wide_q, wide_k, wide_v))
    for gradient, exact in zip(torch.autograd.grad(total(found, lse), (q, k, v)), right, strict=True):
        assert relative_error(gradient, exact) < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_stay_close_to_float64(dtype: torch.dtype) -> None:
    q, k, v = tensors(1024, dtype)
    found = pattern_attention(q, k, v, LONG["strided"])
    expected = pattern_attention(q.double(), k.double(), v.double(), LONG["strided"], backend="dense")
    assert found.dtype == dtype
    assert relative_error(found, expected) < 1e-2


@pytest.mark.parametrize("pattern", [Causal(), Causal().heads({1: Window(9, 9)})], ids=["alike", "by head"])
def test_queries_may_start_where_their_example_does(pattern: Pattern) -> None:
    q, k, v = tensors(700)
    offsets = torch.tensor([600, 300], device="cuda")
    found = pattern_attention(q[:, :, :100], k, v, pattern, query_offset=offsets)
    first, exact_k, exact_v = q[:, :, :100].double(), k.double(), v.double()
    expected = pattern_attention(first, exact_k, exact_v, pattern, query_offset=offsets, backend="dense")
    assert relative_error(found, expected) < 1e-3
