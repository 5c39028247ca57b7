"""Queries that keep more scores than have room beside those of the others: computed apart, over all keys.

Their weights are computed again in the backward pass; which scores a query keeps that has a tie is not, since rounding
in between could break the tie: their places are kept, in four bytes each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.choice import chosen
from subquad.ops.onednn import product
from subquad.ops.topk.key_ranges import KeyRanges
from subquad.ops.topk.largest import largest
from subquad.ops.topk.sparse_rows import softmax_, softmax_backward


class Part(NamedTuple):
    """Some heads that see the same ranges of keys, G of all B * H.

    Attributes:
        heads: which ones.
        ranges: what their queries see.
        q: (G, L, E), scaled, float32 or wider as the others, contiguous.
        k: (G, W, E), of the valid keys.
        v: (G, W, Ev).
    """

    heads: slice
    ranges: KeyRanges
    q: Tensor
    k: Tensor
    v: Tensor


def rows_apart(part: Part, apart: Tensor, pairs: int) -> Iterator[tuple[int, Tensor]]:
    """The queries marked in `apart`, bool (G, L), as heads and places (R,), few enough at a time for `pairs` scores."""
    if not bool(apart.any()):
        return
    for head, marked in enumerate(apart):
        for rows in marked.nonzero()[:, 0].split(max(1, pairs // part.ranges.width)):
            yield head, rows


def scores_apart(part: Part, head: int, rows: Tensor) -> Tensor:
    """The scores of some queries with all keys, (R, W), -inf where they don't see them."""
    scores, columns = product(part.q[head, rows], part.k[head]), torch.arange(part.ranges.width, device=rows.device)
    first, last = part.ranges.first[rows, None], part.ranges.last[rows, None]
    return scores.masked_fill_((columns < first) | (columns >= last), -torch.inf)


def kept_places(scores: Tensor, top_k: int) -> Tensor:
    """Where the scores (R, W) stand that are kept, among all of them: int32 (N,), a choice."""

    def choose(scores: Tensor) -> tuple[Tensor]:
        return ((scores >= largest(scores, top_k)[0][:, -1:]).flatten().nonzero()[:, 0],)

    return chosen(scores, choose, below=(scores.numel(),))[0].int()


def weights_apart(scores: Tensor, kept: Tensor | None) -> Tensor:
    """Softmax over the scores (R, W) at the places that are kept; None for all."""
    if kept is not None:
        places = kept.long()
        scores = torch.full_like(scores, -torch.inf).put_(places, scores.take(places))
    return softmax_(scores)


def add_gradients_apart(
    part: Part, head: int, rows: Tensor, kept: Tensor | None, grad: Tensor, found: list[Tensor]
) -> None:
    """Add what these queries send to the gradients of q, k and v."""
    weights, upstream = weights_apart(scores_apart(part, head, rows), kept), grad[head, rows]
    grad_scores = softmax_backward(weights, upstream @ part.v[head].mT)
    found[0][head, rows] = grad_scores @ part.k[head]
    found[1][head] += grad_scores.mT @ part.q[head, rows]
    found[2][head] += weights.mT @ upstream
