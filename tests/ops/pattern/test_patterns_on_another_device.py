"""Pattern attention where no CPU is: by pieces on any device, by FlexAttention, here its definition, as on a GPU."""

from __future__ import annotations

import re

import pytest
import torch
from another_device import another_device, here, there
from long_patterns import LONG, triple
from torch import Tensor

from subquad import Mask, receipts
from subquad.ops import pattern_attention, pattern_attention_with_lse
from subquad.ops.pattern import flex
from subquad.patterns import Causal, Pattern, Window

LENGTH = 5 * flex.BLOCK + 67
POSITION = torch.arange(LENGTH)
FACTS = {
    "nothing": None,
    "padding": Mask(torch.tensor([[LENGTH - 100], [LENGTH]]) > POSITION),
    "documents": Mask(segments=(POSITION // 90).expand(2, -1)),
    "global tokens": Mask(global_tokens=(POSITION % 100 == 7).expand(2, -1)),
}
BY_HEAD = Causal().heads({1: Window(9, 9)})
BACKENDS = ("flex", "blocked")


def step(
    tensors: tuple[Tensor, ...], pattern: Pattern, mask: Mask | None, offset: int | Tensor, backend: str
) -> tuple[Tensor, ...]:
    """Result, log-sum-exp, and the gradients of a combination of both."""
    q, k, v = (tensor.requires_grad_() for tensor in tensors)
    out, lse = pattern_attention_with_lse(q, k, v, pattern, mask=mask, query_offset=offset, backend=backend)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    total = (out * weights).sum() + (lse.masked_fill(lse.isinf(), 0.0) * weights[..., 0]).sum()
    return out, lse, *torch.autograd.grad(total, (q, k, v))


def assert_equals_the_definition(
    backend: str, pattern: Pattern, mask: Mask | None = None, offset: int | Tensor = 0, queries: int = LENGTH
) -> None:
    q, k, v = (x.detach() for x in triple(LENGTH, batch=2))
    q = q[:, :, :queries]
    expected = step((q, k, v), pattern, mask, offset, "dense")
    with another_device():
        moved = None if mask is None else mask.map(there)
        found = here(step(there((q, k, v)), pattern, moved, there(offset), backend))
    for got, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(got, exact.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_those_of_the_definition(backend: str, name: str, fact: str) -> None:
    assert_equals_the_definition(backend, LONG[name], FACTS[fact])


@pytest.mark.parametrize("pattern", [Causal(), BY_HEAD], ids=["alike", "by head"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_may_start_where_their_example_does(backend: str, pattern: Pattern) -> None:
    assert_equals_the_definition(backend, pattern, offset=torch.tensor([200, 150]), queries=40)


@pytest.mark.parametrize("pattern", [Causal() & Window(30, 0), BY_HEAD], ids=["alike", "by head"])
def test_short_sequences_run_in_slices_there_too(pattern: Pattern) -> None:
    q, k, v = (x.detach() for x in triple(40))
    expected = pattern_attention(q, k, v, pattern, backend="dense")
    with another_device(), receipts() as left:
        found = here(pattern_attention(*there((q, k, v)), pattern=pattern, backend="blocked"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert [receipt.ran for receipt in left.entries] == ["dense attention in slices of queries"]


@pytest.mark.parametrize(
    ("dtype", "width", "reason"),
    [
        (torch.float64, 16, r"computes in torch.float32, .*, got torch.float64"),
        (torch.float32, 8, "needs heads at least 16 wide on meta, got 8"),
    ],
)
def test_what_flex_attention_cant_do_runs_by_pieces_with_a_receipt(dtype: torch.dtype, width: int, reason: str) -> None:
    q, k, v = (x.detach() for x in triple(LENGTH, dtype=dtype, width=width))
    expected = pattern_attention(q, k, v, LONG["window"], backend="dense")
    with another_device(flex_limits=True), receipts() as left:
        found = here(pattern_attention(*there((q, k, v)), pattern=LONG["window"]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    (receipt,) = left.entries
    assert (receipt.asked, receipt.ran) == ("the default, flex", "blocked")
    assert re.fullmatch(f"FlexAttention {reason}", receipt.reason)
