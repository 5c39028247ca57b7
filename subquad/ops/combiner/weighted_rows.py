"""Averages of the values of blocks of tokens, or of values and keys: summaries that are made block by block.

Plain matrix products, for which one or many queries of a block are the same, and whose gradients are added where they
belong. The weights are made again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.combiner.block_products import in_blocks, multiply
from subquad.ops.partial_softmax import CALL_BYTES
from subquad.ops.rectangles import Source


class Averages(NamedTuple):
    """What queries read from their blocks.

    Attributes:
        value: averages of values (G, R, E).
        key: averages of keys; None where nothing wants them.
        weights: (G, n, r, m).
    """

    value: Tensor
    key: Tensor | None
    weights: Tensor


def average_blocks(
    q: Tensor,
    tokens: Source,
    sizes: tuple[int, int],
    bias: Tensor | None,
    scale: float,
    *,
    keys: bool,
    scores: Tensor | None,
) -> Averages:
    """Average the first n blocks of m tokens (G, L, E), each by r queries.

    Args:
        q: (G, n r, E).
        tokens: the keys and values.
        sizes: r and m.
        bias: added to the scores, broadcastable to (n, 1, r, m), 0 or -inf; None for nothing.
        scale: factor of the scores.
        keys: whether keys are averaged too.
        scores: (G, n or more, r, m), where these are there already.
    """
    rows, size = sizes
    value, key = torch.empty_like(q), torch.empty_like(q) if keys else None
    weights = q.new_empty(q.shape[0], q.shape[1] // rows, rows, size)
    if bias is not None:
        bias = bias.transpose(0, 1).clamp_min(torch.finfo(q.dtype).min / 4)  # finite: a block may have nothing
    for start, stop in _ranges(weights):
        k, v = (in_blocks(x, start, stop, size) for x in tokens)
        some = weights[:, start:stop]
        if scores is None:
            multiply(some, in_blocks(q, start, stop, rows), k.mT, scale)
        of_queries = some if scores is None else scores[:, start:stop]
        if bias is not None:
            of_queries = torch.add(of_queries, bias[:, start:stop] if bias.shape[1] > 1 else bias, out=some)
        torch.softmax(of_queries, dim=-1, out=some)
        multiply(in_blocks(value, start, stop, rows), some, v)
        if key is not None:
            multiply(in_blocks(key, start, stop, rows), some, k)
    return Averages(value, key, weights)


def average_blocks_backward(
    grad: Source,
    made: Averages,
    q: Tensor,
    tokens: Source,
    grad_q: Tensor,
    grads: Source,
    scale: float,
    grad_scores: Tensor | None,
) -> None:
    """Add the gradients of queries, keys and values from those of the averages (G, n r, E).

    Where scores were given, theirs are added to `grad_scores` (G, n or more, r, m), and the share of the scores in the
    gradients of queries and keys is the caller's to make.
    """
    rows, size = made.weights.shape[-2:]
    for start, stop in _ranges(made.weights):
        of_key, of_value, queries, of_q = (in_blocks(x, start, stop, rows) for x in (*grad, q, grad_q))
        k, v, of_k, of_v = (in_blocks(x, start, stop, size) for x in (*tokens, *grads))
        some = made.weights[:, start:stop]
        of_weights = torch.empty_like(some)
        multiply(of_weights, of_value, v.mT)
        multiply(of_v, some.mT, of_value, add=True)
        if made.key is not None:
            multiply(of_weights, of_key, k.mT, add=True)
            multiply(of_k, some.mT, of_key, add=True)
        found = torch.ops.aten._softmax_backward_data(of_weights, some, -1, of_weights.dtype)
        if grad_scores is not None:
            grad_scores[:, start:stop] += found
        else:
            multiply(of_q, found, k, scale, add=True)
            multiply(of_k, found.mT, queries, scale, add=True)


def _ranges(weights: Tensor) -> Iterator[tuple[int, int]]:
    """Blocks whose weights stay in the cache."""
    count = weights.shape[1]
    step = max(1, CALL_BYTES // weights[:, :1].nbytes) if count else 1
    return ((start, min(start + step, count)) for start in range(0, count, step))
