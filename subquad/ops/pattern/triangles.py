"""Causal attention inside many equal blocks by batched products, which leave most of what is hidden out.

The fused operator computes the whole square of a small block. Here some rows of every block run at a time, against the
columns up to the last of them: a block of four times as many computes 5/8 of its square.

    P = exp(scale q kᵀ - lse)    dS = P ⊙ (grad vᵀ - delta)    dv = Pᵀ grad    dk = scale dSᵀ q    dq = scale dS k

for delta_i = grad_i · out_i less the gradient of lse_i.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from subquad.ops.partial_softmax import merge
from subquad.ops.pattern.piece import Gradients, Work

STEP_ROWS = 64
"""Rows of a block that run at a time: fewer hide less, but make products that are too small."""
LEAST_SIZE, MOST_SIZE = 64, 512
"""Sizes of blocks that pay, as far as they were measured."""
LOG2_E = math.log2(math.e)
"""Makes a power of two of an exponential, which costs more."""
LEAST_TOKENS = 2048
"""Tokens of all blocks that pay: measured, fewer cost more in calls than they save."""


def triangles_pay(blocks: int, size: int) -> bool:
    """Whether blocks of this size run faster here than with the fused operator."""
    return LEAST_SIZE <= size <= MOST_SIZE and blocks * size >= LEAST_TOKENS


def triangles_forward(work: Work) -> None:
    """Merge what the queries of blocks find into `work.out` and `work.lse`.

    Args:
        work: N blocks: q, k, v, out (N, size, E), lse (N, size).
    """
    for rows, columns in _steps(work.q.shape[1]):
        scores = torch.bmm(work.q[:, rows] * work.scale, work.k[:, columns].mT)
        own = scores[:, :, rows]
        own.masked_fill_(torch.ones_like(own[0], dtype=torch.bool).triu_(diagonal=1), -torch.inf)
        highest = scores.amax(dim=-1)
        weights = torch.softmax(scores, dim=-1, out=scores)
        lse = highest - weights.amax(dim=-1).log()
        found = torch.bmm(weights, work.v[:, columns])
        merge(work.out[:, rows], work.lse[:, rows], found, lse, fresh=work.fresh)


def triangles_backward(work: Work, gradients: Gradients) -> None:
    """Add what `fused_backward` and `lse_backward` give; write the gradient of q where the work is fresh.

    Args:
        work: as in `triangles_forward`, out and lse final and finite.
        gradients: likewise; those of different blocks don't overlap.
    """
    slope = -(gradients.out * work.out).sum(dim=-1)
    if gradients.lse is not None:
        slope += gradients.lse
    for rows, columns in _steps(work.q.shape[1]):
        q, grad, k, v = work.q[:, rows], gradients.out[:, rows], work.k[:, columns], work.v[:, columns]
        level = work.lse[:, rows, None]
        weights = torch.baddbmm(level, q, k.mT, beta=-LOG2_E, alpha=work.scale * LOG2_E).exp2_()
        weights.tril_(diagonal=rows.start)
        of_scores = torch.baddbmm(slope[:, rows, None], grad, v.mT).mul_(weights)
        gradients.v[:, columns].add_(torch.bmm(weights.mT, grad))
        gradients.k[:, columns].add_(torch.bmm(of_scores.mT, q), alpha=work.scale)
        of_q = torch.bmm(of_scores, k)
        target = gradients.q[:, rows]
        torch.mul(of_q, work.scale, out=target) if work.fresh else target.add_(of_q, alpha=work.scale)


def _steps(size: int) -> Iterator[tuple[slice, slice]]:
    """Rows, and the columns up to the last of them."""
    for start in range(0, size, STEP_ROWS):
        stop = min(start + STEP_ROWS, size)
        yield slice(start, stop), slice(0, stop)
