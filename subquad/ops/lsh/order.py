"""The order of tokens by bucket in every round, and codes of its places that tell who is on whose list.

Codes grow by 2 from chunk to chunk, and where lists end with the bucket by further 2 (1 + max(a, b)) from bucket to
bucket, so that j is on i's list of b chunks before its own and a behind it if and only if code_i - b + a differs from
code_j by no more than a + b.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.lsh.lists import ListRule

NO_QUERY, NO_KEY = -(2**29), -(2**30)
"""Codes of slots that hold no token."""


class Order(NamedTuple):
    """The order of the tokens in every round.

    Attributes:
        tokens: int32 (B, H, rounds, L), the token at every place, invalid ones last.
        codes: int32 (B, H, rounds, L), by place; None where tiles alone make the lists.
        counts: number of valid tokens of each example.
    """

    tokens: Tensor
    codes: Tensor | None
    counts: list[int]


def sort_by_bucket(buckets: Tensor, rule: ListRule, valid: Tensor | None) -> Order:
    """Sort by (bucket, position), invalid tokens last: in one dimension, for which torch has a faster sort."""
    buckets = buckets[:, :, : rule.different_rounds(*buckets.shape[2:])]
    *rows, length = buckets.shape
    counts = [length] * rows[0] if valid is None else valid.sum(dim=1).tolist()
    above = int(buckets.max()) + 1 if buckets.numel() else 1
    keys = buckets if valid is None else buckets.masked_fill(~valid[:, None, None], above)
    keys = keys.flatten(0, 2)
    row = torch.arange(len(keys), device=keys.device)[:, None]
    in_order, index = (keys + row * (above + 1)).flatten().sort(stable=True)
    tokens = (index.view_as(keys) - row * length).int().view(*rows, length)
    if not (rule.per_bucket or rule.same_bucket_only or rule.dedup or rule.wrap):
        return Order(tokens, None, counts)
    return Order(tokens, _codes(in_order.view(*rows, length), rule), counts)


def _codes(buckets: Tensor, rule: ListRule) -> Tensor:
    """The codes of sorted buckets (B, H, rounds, L); they begin with 0."""
    place = torch.arange(buckets.shape[-1], device=buckets.device)
    opens = torch.zeros_like(buckets, dtype=torch.bool)
    opens[..., 1:] = buckets[..., 1:] != buckets[..., :-1]
    if rule.per_bucket:
        place = place - torch.where(opens, place, 0).cummax(dim=-1).values
    steps = 2 * (place % rule.chunk == 0).int()
    if rule.per_bucket or rule.same_bucket_only:
        steps = torch.add(steps, opens, alpha=2 + 2 * max(rule.sides))
    codes = steps.expand_as(buckets).cumsum(dim=-1, dtype=torch.int32)
    return codes - codes[..., :1]


def codes_of_chunks(length: int, size: int, device: torch.device) -> Tensor:
    """Codes, int32 (L,), that tell chunks apart and no buckets."""
    return 2 * (torch.arange(length, dtype=torch.int32, device=device) // size)


def is_listed(queries: Tensor, keys: Tensor, reach: Tensor) -> Tensor:
    """Whether keys are on the lists of queries, by the codes of both, those of queries less b - a; reach: a + b."""
    return (queries - keys).abs_() <= reach
