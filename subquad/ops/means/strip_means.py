"""Means for a strip of queries, over columns in reach of the bias and, as one column each, those on either side.

    Σ_j exp(k_j + w_ij) v_j = exp(top_i + peak) Σ_j exp(w_ij - top_i) exp(k_j - peak) v_j

top_i is the largest w of a row, peak about the largest k in each channel. A row whose sum of weights comes out too
small has its weight on columns that are small in both, or sees no column near the peak, and would lose digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.means.gated import Kept, Wanted
from subquad.ops.means.pair_means import gradients_by_pairs, means_by_pairs
from subquad.ops.means.position_bias import PositionBias
from subquad.ops.means.running_means import NOTHING, Means
from subquad.ops.means.strip_geometry import Strip
from subquad.ops.means.weighted_columns import Columns
from subquad.ops.stacked_products import add_stacked_product_, stacked_product


class Tokens(NamedTuple):
    """What a call weighs.

    Attributes:
        k: (B, G, S, E or 1), `NOTHING` where there is no key.
        v: (B, G, S, E).
        bias: of the positions.
    """

    k: Tensor
    v: Tensor
    bias: PositionBias


def strip_means(tokens: Tokens, strip: Strip, columns: Columns, far: Sequence[Means], result: Kept) -> Tensor | None:
    """Write the means for the queries of a strip.

    Args:
        tokens: of the call.
        strip: the pairs.
        columns: the weighted columns, of this strip and others.
        far: means over columns that no bias of the strip reaches, seen by all of its queries.
        result: of the strip's queries alone; its levels are those of products, or the logarithms of weights.

    Returns:
        The largest score of each row, (·, ·, R, 1), or None where the means were summed pair by pair.
    """
    scores, width = strip.hide_(_scores(tokens.bias, strip)), tokens.v.shape[3]
    top = _top(scores, far)
    sums = stacked_product(scores.sub_(top).exp_(), columns.of(strip, columns.weighted))
    for mean in far:
        sums.addcmul_((-top).exp_(), columns.far(mean))
    weights = sums[..., width:]
    if _too_small(weights, tokens.k, strip):
        scores = strip.hide_(_scores(tokens.bias, strip))
        by_pairs = means_by_pairs(_with_far(scores, far), *_joined(tokens, strip, far))
        result.level.copy_(by_pairs.total)
        result.mean.copy_(by_pairs.mean)
        return None
    weights.clamp_min_(torch.finfo(weights.dtype).tiny)
    torch.reciprocal(weights, out=result.level)
    torch.div(sums[..., :width], weights, out=result.mean)
    return top


def add_strip_gradients_(
    sums: Tensor, tokens: Tokens, strip: Strip, columns: Columns, far: Sequence[Means], wanted: Wanted, top: Tensor
) -> tuple[Tensor, list[Means]]:
    """Gradients of a strip whose means products gave: of its scores, limited as they are, and of the far means.

    Both products with the weights want them column by column, and get them so instead of copied.

    Args:
        sums: (B, G, W, ·), to which the gradients of the weighted columns of all strips are added.
        tokens: of the call.
        strip: the pairs.
        columns: the weighted columns.
        far: as in `strip_means`.
        wanted: of the strip's queries.
        top: the result of `strip_means`.
    """
    width = tokens.v.shape[3]
    of_sums = sums.new_empty((*wanted.grad.shape[:3], sums.shape[3]))
    torch.mul(wanted.grad, wanted.kept.level, out=of_sums[..., :width])
    torch.mul(wanted.of_weights, wanted.kept.level.neg(), out=of_sums[..., width:])
    of_far: list[Means] = []
    for mean in far:
        of_column = (-top).exp_().mT @ of_sums
        of_values, of_weights = of_column.split((width, of_column.shape[3] - width), dim=3)
        weight = (mean.total - columns.peak).exp_()
        of_total = (of_values * mean.mean).sum_to_size(weight.shape).add_(of_weights).mul_(weight)
        of_far.append(Means(of_total, of_values * weight))
    rows = strip.hide_(_scores(tokens.bias, strip, columns_first=True)).sub_(top).exp_()
    add_stacked_product_(columns.of(strip, sums), rows.mT, of_sums)
    of_rows = stacked_product(columns.of(strip, columns.weighted), of_sums.mT).mT
    return strip.limit_(of_rows.sum_to_size(rows.shape).mul_(rows)), of_far


def pair_gradients(
    tokens: Tokens, strip: Strip, far: Sequence[Means], wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor, list[Means]]:
    """Gradients of a strip pair by pair: of its k and v, its scores, and the far means."""
    scores = _with_far(strip.hide_(_scores(tokens.bias, strip)), far)
    joined = _joined(tokens, strip, far)
    of_k, of_v, of_scores = gradients_by_pairs(scores, *joined, Means(*wanted.kept), wanted.grad)
    own = strip.columns.stop - strip.columns.start
    of_far = [Means(of_k[:, :, i : i + 1], of_v[:, :, i : i + 1]) for i in range(own, own + len(far))]
    return of_k[:, :, :own], of_v[:, :, :own], strip.limit_(of_scores[..., :own].contiguous()), of_far


def _scores(bias: PositionBias, strip: Strip, *, columns_first: bool = False) -> Tensor:
    return strip.limit_(bias.scores(strip.queries, strip.columns, strip.offset, columns_first=columns_first))


def _top(scores: Tensor, far: Sequence[Means]) -> Tensor:
    """The largest score of each row; far columns have a bias of 0."""
    top = scores.amax(dim=3, keepdim=True)
    return top.clamp_min_(0.0) if far else top


def _too_small(weights: Tensor, k: Tensor, strip: Strip) -> bool:
    """Whether a query that has a key itself would lose digits."""
    smallest = torch.finfo(weights.dtype).tiny ** 0.5
    if not weights.numel() or not bool(weights.amin() < smallest):
        return False
    real = k[:, :, strip.offset + strip.queries.start : strip.offset + strip.queries.stop] > NOTHING / 2
    return bool((weights.masked_fill(~real, 1.0) < smallest).any())


def _with_far(scores: Tensor, far: Sequence[Means]) -> Tensor:
    return F.pad(scores, (0, len(far)))


def _joined(tokens: Tokens, strip: Strip, far: Sequence[Means]) -> tuple[Tensor, Tensor]:
    """K and v of a strip, the far means behind them."""
    k, v = tokens.k[:, :, strip.columns], tokens.v[:, :, strip.columns]
    return torch.cat((k, *(mean.total for mean in far)), dim=2), torch.cat((v, *(mean.mean for mean in far)), dim=2)
