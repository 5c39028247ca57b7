"""Averages of keys and values together: one softmax for each query of a rectangle, and two things that it weighs.

The weights are made once for both, by plain matrix products, and made again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.piece import CALL_BYTES
from subquad.ops.rectangles import TOKENS, Part, Source


class _Rectangles(NamedTuple):
    """Some rectangles of a part.

    Attributes:
        part: which.
        q: (count, G, rows, E).
        k: (count, G, columns, E).
        both: (count, G, columns, 2 E), values and keys.
        weights: (count, G, rows, columns).
    """

    part: Part
    q: Tensor
    k: Tensor
    both: Tensor
    weights: Tensor


def average_both(part: Part, q: Tensor, tokens: Source, scale: float) -> Source:
    """What the queries q (G, rows, E) read from the keys and values of the tokens: averages of each."""
    found = Source(torch.zeros_like(q), torch.zeros_like(q))
    for some in _rectangles(part, q, tokens, scale):
        value, key = (some.weights @ some.both).chunk(2, dim=-1)
        some.part.rows.of(found.k).copy_(key)
        some.part.rows.of(found.v).copy_(value)
    return found


def average_both_backward(
    part: Part, grad: Source, q: Tensor, tokens: Source, grad_q: Tensor, grads: Source, scale: float
) -> None:
    """Add the gradients of the queries, keys and values from those of the averages (G, rows, E)."""
    for some in _rectangles(part, q, tokens, scale):
        rows, columns = some.part.rows, some.part.keys[0].rows
        upstream = torch.cat((rows.of(grad.v), rows.of(grad.k)), dim=-1)
        of_weights = upstream @ some.both.mT
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, some.weights, -1, of_weights.dtype).mul_(scale)
        rows.add(grad_q, of_scores @ some.k)
        of_values, of_keys = (some.weights.mT @ upstream).chunk(2, dim=-1)
        columns.add(grads.v, of_values)
        columns.add(grads.k, of_keys + of_scores.mT @ some.q)


def _rectangles(part: Part, q: Tensor, tokens: Source, scale: float) -> Iterator[_Rectangles]:
    """The part in pieces whose weights stay in the cache."""
    size = max(1, CALL_BYTES // (4 * q.shape[0] * part.rows.size * part.columns * q.element_size()))
    assert [keys.origin for keys in part.keys] == [TOKENS]
    for some in part.cuts(size):
        queries, keys = some.rows.of(q), some.keys[0].rows.of(tokens.k)
        scores = (queries * scale) @ keys.mT
        if some.bias is not None:
            scores += some.bias
        both = torch.cat((some.keys[0].rows.of(tokens.v), keys), dim=-1)
        yield _Rectangles(some, queries, keys, both, scores.softmax(dim=-1))
