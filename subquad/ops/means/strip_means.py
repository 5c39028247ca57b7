"""Means for strips of queries, over columns in reach of the bias and, as one column each, those on either side.

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

from subquad.ops.means.far_means import Far
from subquad.ops.means.gated import SavedMeans, Wanted
from subquad.ops.means.pair_means import gradients_by_pairs, means_by_pairs
from subquad.ops.means.position_bias import PositionBias
from subquad.ops.means.running_means import LOG_ZERO, Means
from subquad.ops.means.strip_geometry import Strips
from subquad.ops.means.weighted_columns import Columns
from subquad.ops.stacked_products import add_stacked_product_, stacked_product


class Tokens(NamedTuple):
    """What a call weighs.

    Attributes:
        k: (B, G, S, E or 1), `LOG_ZERO` where there is no key.
        v: (B, G, S, E).
        bias: of the positions.
    """

    k: Tensor
    v: Tensor
    bias: PositionBias


class Summed(NamedTuple):
    """Strips whose means are known.

    Attributes:
        strips: which.
        top: the largest score of each row, (·, ·, ⟨N⟩, R, 1); None where the means were summed pair by pair.
    """

    strips: Strips
    top: Tensor | None


def strip_means(tokens: Tokens, strips: Strips, columns: Columns, far: Far, result: SavedMeans) -> list[Summed]:
    """Write the means for the queries of some strips.

    Args:
        tokens: of the call.
        strips: the pairs.
        columns: the weighted columns, of these strips and others.
        far: means over columns that no bias of a strip reaches, seen by all of its queries.
        result: of all queries; levels are one over the sums that products gave, or the logarithms of weights.

    Returns:
        All of the strips, one by one if the products don't do for one of them.
    """
    scores, seen = strips.hide_(_scores(tokens.bias, strips)), far.seen(strips)
    top = _top(scores, seen)
    rows, width = _for_each(scores.sub_(top).exp_(), strips), tokens.v.shape[3]
    of_far, far_columns = _for_each((-top).exp_(), strips), [columns.far(mean)[:, :, :, None] for mean in seen]
    for i, strip in enumerate(strips.singles()):
        sums = stacked_product(rows[:, :, i], columns.of(strip, columns.weighted))
        for column in far_columns:
            sums.addcmul_(of_far[:, :, i], column[:, :, i])
        if _too_small(sums[..., width:], tokens.k, strip):
            return _separately(tokens, strips, columns, far, result)
        own = result.of(strip.queries)
        torch.reciprocal(sums[..., width:], out=own.level)
        torch.mul(sums[..., :width], own.level, out=own.mean)
    return [Summed(strips, top)]


def _separately(tokens: Tokens, strips: Strips, columns: Columns, far: Far, result: SavedMeans) -> list[Summed]:
    """Each strip for itself; a single one pair by pair."""
    if len(strips.numbers) > 1:
        return [one for strip in strips.singles() for one in strip_means(tokens, strip, columns, far, result)]
    scores, seen = strips.hide_(_scores(tokens.bias, strips)), far.seen(strips)
    own, by_pairs = result.of(strips.queries), means_by_pairs(*_joined(tokens, strips, scores, seen))
    own.level.copy_(by_pairs.total)
    own.mean.copy_(by_pairs.mean)
    return [Summed(strips, None)]


def add_strip_gradients_(
    sums: Tensor, tokens: Tokens, strips: Strips, columns: Columns, far: tuple[Far, Far], wanted: Wanted, top: Tensor
) -> Tensor:
    """The gradients of scores, limited as they are, of strips whose means products gave.

    Both products with the weights want them column by column, and get them so instead of copied.

    Args:
        sums: (B, G, W, ·), to which the gradients of the weighted columns are added.
        tokens: of the call.
        strips: the pairs.
        columns: the weighted columns.
        far: the far means, and their gradients, which are written to.
        wanted: of the strips' queries.
        top: of the scores.

    Returns:
        (·, ·, ⟨N⟩, R, W).
    """
    of_sums = _gradients_of_sums(wanted, tokens.v.shape[3]).unflatten(2, (len(strips.numbers), strips.rows))
    seen, of_seen = (x.seen(strips) for x in far)
    if seen:
        of_far = ((-top).exp_().mT @ of_sums).squeeze(3)
        for mean, of_mean in zip(seen, of_seen, strict=True):
            _write_far_gradients(of_mean, mean, columns.peak, of_far)
    rows, found = strips.hide_(_scores(tokens.bias, strips, columns_first=True)).sub_(top).exp_(), []
    weights = _for_each(rows.mT, strips)
    for i, strip in enumerate(strips.singles()):
        add_stacked_product_(columns.of(strip, sums), weights[:, :, i], of_sums[:, :, i])
        of_weights = stacked_product(columns.of(strip, columns.weighted), of_sums[:, :, i].mT)
        found.append(of_weights.sum_to_size(rows[:, :, 0].mT.shape))
    of_rows = torch.stack(found, dim=2).sum_to_size(rows.mT.shape).mT
    return strips.limit_(of_rows.mul_(rows))


def pair_gradients(
    tokens: Tokens, strip: Strips, far: tuple[Far, Far], wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a single strip pair by pair: of its k and v, and its scores; other arguments as above."""
    seen, of_seen = (x.seen(strip) for x in far)
    joined = _joined(tokens, strip, strip.hide_(_scores(tokens.bias, strip)), seen)
    of_k, of_v, of_scores = gradients_by_pairs(*joined, Means(*wanted.kept), wanted.grad)
    for i, of_mean in enumerate(of_seen, start=strip.width):
        of_mean.total.copy_(of_k[:, :, i : i + 1])
        of_mean.mean.copy_(of_v[:, :, i : i + 1])
    own = slice(strip.width)
    return of_k[:, :, own], of_v[:, :, own], strip.limit_(of_scores[:, :, None, :, own].contiguous())


def _scores(bias: PositionBias, strips: Strips, *, columns_first: bool = False) -> Tensor:
    return strips.limit_(bias.scores(strips, columns_first=columns_first))


def _for_each(x: Tensor, strips: Strips) -> Tensor:
    """(·, ·, ⟨N⟩, ·, ·) -> (·, ·, N, ·, ·)."""
    return x.expand(-1, -1, len(strips.numbers), -1, -1)


def _gradients_of_sums(wanted: Wanted, width: int) -> Tensor:
    """Of the products before one is divided by the other, (B, G, L, E + (E or 1))."""
    level = wanted.kept.level
    of_sums = level.new_empty((*level.shape[:3], width + level.shape[3]))
    torch.mul(wanted.grad, level, out=of_sums[..., :width])
    torch.mul(wanted.of_weights, level, out=of_sums[..., width:]).neg_()
    return of_sums


def _write_far_gradients(of_mean: Means, mean: Means, peak: Tensor, of_columns: Tensor) -> None:
    """Gradients of far means from those of the columns that stand for them, (B, G, N, ·)."""
    of_values, of_weights = of_columns.split((mean.mean.shape[3], mean.total.shape[3]), dim=3)
    weight = (mean.total - peak).exp_()
    of_mean.total.copy_((of_values * mean.mean).sum_to_size(weight.shape).add_(of_weights).mul_(weight))
    torch.mul(of_values, weight, out=of_mean.mean)


def _top(scores: Tensor, far: Sequence[Means]) -> Tensor:
    """The largest score of each row; far columns have a bias of 0."""
    top = scores.amax(dim=-1, keepdim=True)
    return top.clamp_min_(0.0) if far else top


def _too_small(weights: Tensor, k: Tensor, strip: Strips) -> bool:
    """Whether a query that has a key itself would lose digits. Those of others are raised to what can be divided by."""
    smallest = torch.finfo(weights.dtype).tiny ** 0.5
    if not weights.numel() or not bool(weights.amin() < smallest):
        return False
    real = k[:, :, strip.offset + strip.queries.start : strip.offset + strip.queries.stop] > LOG_ZERO / 2
    weights.masked_fill_(~real, 1.0)
    return bool((weights < smallest).any())


def _joined(tokens: Tokens, strip: Strips, scores: Tensor, far: Sequence[Means]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (·, ·, R, W), k and v of a single strip, the far means behind them."""
    k, v = tokens.k[:, :, strip.columns], tokens.v[:, :, strip.columns]
    k, v = torch.cat((k, *(mean.total for mean in far)), dim=2), torch.cat((v, *(mean.mean for mean in far)), dim=2)
    return F.pad(scores[:, :, 0], (0, len(far))), k, v
