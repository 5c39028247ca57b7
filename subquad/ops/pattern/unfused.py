"""The backward pass of large rectangles by five products of matrices, where these are faster than the fused operator.

    P = exp(scale k qᵀ - lse)    dS = P ⊙ (v gradᵀ - delta)    dv = P grad    dk = scale dS q    dq = scale dSᵀ k

for delta_i = grad_i · out_i less the gradient of lse_i. P and dS stand keys by queries, so that what belongs to a query
is a bias of the products. The exponential is part of the first of them: for x <= 0 and ε the machine's,

    exp(x) = (1 / ε) / (1 + exp(-log ε - x)),  but for a factor of at most 1 + ε.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from subquad.ops.onednn import add_product_, logistic_product, outruns_mm, product, product_over_rows, suits
from subquad.ops.pattern.piece import Gradients, Work

LEAST_PAIRS = 2**17
"""Pairs of the smallest rectangle that pays: measured, the products of a smaller one are too small to run fast."""
TILE_ROWS = 1024
"""Most queries whose products are taken at once."""
TILE_PAIRS = 2**18
"""Most pairs likewise: their weights stay in the cache."""


def unfused_pays(rows: int, columns: int, like: Tensor) -> bool:
    """Whether rectangles of this size run faster here; `like` has the dtype and the device."""
    return rows * columns >= LEAST_PAIRS and outruns_mm() and suits(like, like)


def add_unfused(work: Work, gradients: Gradients, visible: Tensor | None) -> None:
    """Add what `fused_backward` and `lse_backward` give; write the gradient of q where the work is fresh.

    Args:
        work: N rectangles for the heads: q, out (N, rows, E), lse (N, rows) finite, k, v (N, columns, E).
        gradients: likewise; those of q don't overlap.
        visible: 0 or 1, (N or 1, columns, rows); None where everything is.
    """
    inverse_epsilon = 1 / torch.finfo(work.q.dtype).eps
    grad = gradients.out * inverse_epsilon
    slope = -(grad * work.out).sum(dim=-1)
    if gradients.lse is not None:
        slope += gradients.lse * inverse_epsilon
    level = -(work.lse + math.log(inverse_epsilon))
    q = work.q * work.scale
    for index in range(len(q)):
        shown = None if visible is None else visible[index % len(visible)]
        for rows in _ranges(q.shape[1], TILE_ROWS):
            tile = q[index, rows], grad[index, rows], level[index, rows], slope[index, rows]
            part = None if shown is None else shown[:, rows]
            of_q = work.scale * _add_tile(tile, work.k[index], work.v[index], gradients, index, part)
            target = gradients.q[index, rows]
            target.copy_(of_q) if work.fresh else target.add_(of_q)


def _add_tile(
    tile: tuple[Tensor, Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    gradients: Gradients,
    index: int,
    visible: Tensor | None,
) -> Tensor:
    """Add the gradients of k and v of one rectangle; returns that of q, before it is scaled."""
    q, grad, level, slope = tile
    of_q = torch.zeros_like(q)
    for columns in _ranges(len(k), max(1, TILE_PAIRS // len(q))):
        weights = logistic_product(k[columns], q, level)
        if visible is not None:
            weights.mul_(visible[columns])
        of_scores = product(v[columns], grad, slope).mul_(weights)
        add_product_(gradients.v[index, columns], weights, grad.T)
        add_product_(gradients.k[index, columns], of_scores, q.T)
        of_q.add_(product_over_rows(of_scores, k[columns]))
    return of_q


def _ranges(count: int, size: int) -> Iterator[slice]:
    """Ranges of about equal length, at most `size`."""
    size = math.ceil(count / math.ceil(count / size))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
