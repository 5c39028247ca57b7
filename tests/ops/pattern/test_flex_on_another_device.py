"""Pattern attention as on a GPU, where there is none: block masks made there, FlexAttention by its definition."""

from __future__ import annotations

import pytest
import torch
from another_device import another_device, here, there
from long_patterns import LONG, triple

from subquad import Mask
from subquad.ops import pattern_attention_with_lse
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


def assert_equals_the_definition(
    pattern: Pattern, mask: Mask | None = None, *, query_offset: int | torch.Tensor = 0, queries: int = LENGTH
) -> None:
    q, k, v = (x.double() for x in triple(LENGTH, batch=2))
    q = q[:, :, :queries]
    expected = pattern_attention_with_lse(q, k, v, pattern, mask=mask, query_offset=query_offset, backend="dense")
    with another_device():
        q, k, v, offset = there((q, k, v, query_offset))
        moved = None if mask is None else mask.map(there)
        found = here(pattern_attention_with_lse(q, k, v, pattern, mask=moved, query_offset=offset))
    for got, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("name", LONG)
def test_block_masks_list_what_the_definition_shows(name: str, fact: str) -> None:
    assert_equals_the_definition(LONG[name], FACTS[fact])


@pytest.mark.parametrize("pattern", [Causal(), Causal().heads({1: Window(9, 9)})], ids=["alike", "by head"])
def test_queries_may_start_where_their_example_does(pattern: Pattern) -> None:
    assert_equals_the_definition(pattern, query_offset=torch.tensor([200, 150]), queries=40)
