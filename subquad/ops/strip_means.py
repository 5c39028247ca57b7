"""Means over the columns that the bias reaches, for a strip of queries at a time.

    Σ_j exp(k_j + w_ij) v_j = exp(top_i + peak) Σ_j exp(w_ij - top_i) exp(k_j - peak) v_j

top_i is the largest w of a row, peak the largest k of the strip in each channel. A row whose sum of weights comes out
too small has its weight on columns that are small in both, or sees no column near the peak, and would lose digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.position_bias import PositionBias
from subquad.ops.running_means import NOTHING, Means

SHORTEST, LONGEST = 32, 256
"""Queries of a strip: as many as the bias reaches columns, within these bounds."""

PAIRS = 2**22
"""Weights of pairs and channels that are held at once where products won't do."""


class Strip(NamedTuple):
    """A rectangle of pairs.

    Attributes:
        queries: which.
        columns: those that one of the queries sees with a bias.
        offset: query i is column `offset` + i.
        left: how many columns before itself a query sees; None for all.
        right: after itself; None for all.
    """

    queries: slice
    columns: slice
    offset: int
    left: int | None
    right: int | None

    @property
    def pairs(self) -> int:
        """All of the rectangle."""
        return (self.queries.stop - self.queries.start) * (self.columns.stop - self.columns.start)

    def hidden(self, device: torch.device) -> Tensor | None:
        """Bool (R, W), True for a pair out of reach; None where there is none."""
        if self.left is None and self.right is None:
            return None
        i = torch.arange(self.queries.start, self.queries.stop, device=device)[:, None] + self.offset
        distance = i - torch.arange(self.columns.start, self.columns.stop, device=device)
        far = torch.zeros_like(distance, dtype=torch.bool)
        far = far if self.left is None else far | (distance > self.left)
        return far if self.right is None else far | (-distance > self.right)


class StripGradients(NamedTuple):
    """Gradients of the columns of a strip.

    Attributes:
        of_k: (B, G, W, E or 1).
        of_v: (B, G, W, E).
        of_scores: (B or 1, G or 1, R, W), as the scores are.
    """

    of_k: Tensor
    of_v: Tensor
    of_scores: Tensor


def strips(length: int, total: int, left: int | None, right: int | None) -> Iterator[Strip]:
    """The strips of `length` queries, the last of `total` columns."""
    reach = total if left is None or right is None else left + right + 1
    size, offset = min(LONGEST, max(SHORTEST, 1 << (reach - 1).bit_length())), total - length
    for first in range(0, length, size):
        last = min(first + size, length)
        begin = 0 if left is None else max(0, offset + first - left)
        end = total if right is None else min(total, offset + last + right)
        yield Strip(slice(first, last), slice(begin, end), offset, left, right)


def strip_means(k: Tensor, v: Tensor, bias: PositionBias, strip: Strip) -> tuple[Means, bool]:
    """Means for the queries of a strip, and whether products gave them.

    Args:
        k: (B, G, S, E or 1), `NOTHING` where there is no key.
        v: (B, G, S, E).
        bias: of the positions.
        strip: the pairs.
    """
    scores, own = _scores(bias, strip, k.device), k[:, :, strip.columns]
    factors = _factors(scores, own)
    values = v[:, :, strip.columns]
    sums = factors.rows @ torch.cat((factors.columns * values, factors.columns), dim=3)
    numerators, weights = sums.split((v.shape[3], k.shape[3]), dim=3)
    real = k[:, :, strip.offset + strip.queries.start : strip.offset + strip.queries.stop] > NOTHING / 2
    smallest = torch.finfo(k.dtype).tiny
    if bool((weights.masked_fill(~real, 1.0) < smallest**0.5).any()):
        return _means_by_pairs(scores, own, values), False
    weights = weights.clamp_min(smallest)
    return Means(weights.log() + factors.top + factors.peak, (numerators / weights,)), True


def backward_strip(
    k: Tensor, v: Tensor, bias: PositionBias, strip: Strip, result: Means, grad: Tensor, *, product: bool
) -> StripGradients:
    """Gradients by a strip.

    Args:
        k: (B, G, S, E or 1).
        v: (B, G, S, E).
        bias: of the positions.
        strip: the pairs.
        result: means and logarithms of all weights, for all queries (B, G, L, ·), whatever they are joined from.
        grad: (B, G, L, E), of the means.
        product: whether products gave the means.
    """
    scores, own, values = _scores(bias, strip, k.device), k[:, :, strip.columns], v[:, :, strip.columns]
    total, mean, grad = (x[:, :, strip.queries] for x in (result.total, result.of[0], grad))
    if not product:
        return _gradients_by_pairs(scores, own, values, Means(total, (mean,)), grad)
    factors = _factors(scores, own)
    of_numerators = grad * (factors.top + factors.peak - total).exp_()
    of_weights = -(of_numerators * mean).sum_to_size(total.shape)
    of_sums = torch.cat((of_numerators, of_weights), dim=3)
    weighted = factors.columns * values
    from_rows = factors.rows.mT @ of_sums
    of_numerators, of_weights = from_rows.split((v.shape[3], k.shape[3]), dim=3)
    of_scores = of_sums @ torch.cat((weighted, factors.columns), dim=3).mT
    of_k = (weighted * of_numerators).sum_to_size(own.shape) + factors.columns * of_weights
    of_v = factors.columns * of_numerators
    return StripGradients(of_k, of_v, of_scores.sum_to_size(scores.shape).mul_(factors.rows))


class _Factors(NamedTuple):
    """The two factors of weights; rows (B or 1, G or 1, R, W), top (·, ·, R, 1), columns as k, peak (B, G, 1, ·)."""

    rows: Tensor
    top: Tensor
    columns: Tensor
    peak: Tensor


def _factors(scores: Tensor, k: Tensor) -> _Factors:
    top, peak = scores.amax(dim=3, keepdim=True), k.amax(dim=2, keepdim=True)
    return _Factors((scores - top).exp_(), top, (k - peak).exp_(), peak)


def _scores(bias: PositionBias, strip: Strip, device: torch.device) -> Tensor:
    scores, hidden = bias.scores(strip.queries, strip.columns, strip.offset), strip.hidden(device)
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


def _row_slices(k: Tensor, rows: int) -> Iterator[slice]:
    size = max(1, PAIRS // max(1, k.numel()))
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def _means_by_pairs(scores: Tensor, k: Tensor, v: Tensor) -> Means:
    """Pair by pair: scores (B or 1, G or 1, R, W), k (B, G, W, E or 1), v (B, G, W, E)."""
    totals, means = [], []
    for rows in _row_slices(v, scores.shape[2]):
        logits = scores[:, :, rows, :, None] + k[:, :, None]
        totals.append(logits.logsumexp(dim=3))
        means.append((logits.softmax(dim=3) * v[:, :, None]).sum(dim=3))
    return Means(torch.cat(totals, dim=2), (torch.cat(means, dim=2),))


def _gradients_by_pairs(scores: Tensor, k: Tensor, v: Tensor, result: Means, grad: Tensor) -> StripGradients:
    """The same of the gradients; `result` and `grad` are those of the rows."""
    of_k, of_v, of_scores = torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(scores)
    for rows in _row_slices(v, scores.shape[2]):
        logits = scores[:, :, rows, :, None] + k[:, :, None]
        of_values = (logits - result.total[:, :, rows, None]).exp_() * grad[:, :, rows, None]
        of_logits = of_values * (v[:, :, None] - result.of[0][:, :, rows, None])
        of_v += of_values.sum(dim=2)
        of_k += of_logits.sum(dim=2).sum_to_size(k.shape)
        of_scores[:, :, rows] = of_logits.sum(dim=4).sum_to_size(scores[:, :, rows].shape)
    return StripGradients(of_k, of_v, of_scores)
