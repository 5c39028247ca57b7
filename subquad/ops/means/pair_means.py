"""Means over the columns of a strip pair by pair and channel by channel, where products would lose digits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from subquad.ops.means.running_means import Means

PAIRS = 2**22
"""Weights of pairs and channels that are held at once."""


def means_by_pairs(scores: Tensor, k: Tensor, v: Tensor) -> Means:
    """Means for R queries.

    Args:
        scores: (B or 1, G or 1, R, W), -inf for a pair that isn't seen.
        k: (B, G, W, E or 1).
        v: (B, G, W, E).
    """
    totals, means = [], []
    for rows in _row_slices(v, scores.shape[2]):
        logits = scores[:, :, rows, :, None] + k[:, :, None]
        totals.append(logits.logsumexp(dim=3))
        means.append((logits.softmax(dim=3) * v[:, :, None]).sum(dim=3))
    return Means(torch.cat(totals, dim=2), torch.cat(means, dim=2))


def gradients_by_pairs(
    scores: Tensor, k: Tensor, v: Tensor, result: Means, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of k, v and the scores.

    Args:
        scores: (B or 1, G or 1, R, W).
        k: (B, G, W, E or 1).
        v: (B, G, W, E).
        result: means of the R queries.
        grad: (B, G, R, E), of the means.
    """
    of_k, of_v, of_scores = torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(scores)
    for rows in _row_slices(v, scores.shape[2]):
        logits = scores[:, :, rows, :, None] + k[:, :, None]
        of_values = (logits - result.total[:, :, rows, None]).exp_() * grad[:, :, rows, None]
        of_logits = of_values * (v[:, :, None] - result.mean[:, :, rows, None])
        of_v += of_values.sum(dim=2)
        of_k += of_logits.sum(dim=2).sum_to_size(k.shape)
        of_scores[:, :, rows] = of_logits.sum(dim=4).sum_to_size(scores[:, :, rows].shape)
    return of_k, of_v, of_scores


def _row_slices(v: Tensor, rows: int) -> Iterator[slice]:
    size = max(1, PAIRS // max(1, v.numel()))
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))
