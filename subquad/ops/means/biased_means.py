"""Weighted means of values over keys and positions, channel by channel: what is left of attention without products.

    y_i = σ(q_i) ⊙ Σ_j exp(k_j + w_ij) ⊙ v_j / Σ_j exp(k_j + w_ij)

w is a number for a pair of positions, the same for all channels of a group, so that the sums inside its reach are
matrix products of exp(w) with exp(k) ⊙ v and exp(k), for a strip of queries at a time; outside of it w is 0, and what
all queries of a strip see there is one more column, a mean. A key that a query doesn't see can't hide those that it
sees: where a row of the product of both stabilised factors would be lost, that strip is summed pair by pair.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from subquad.ops.means.far_means import Far
from subquad.ops.means.gated import SavedMeans, Upstream
from subquad.ops.means.position_bias import PositionBias
from subquad.ops.means.running_means import LOG_ZERO, running_gradients, running_means
from subquad.ops.means.strip_geometry import BiasReach, Strips, strips
from subquad.ops.means.strip_means import Summed, Tokens, add_strip_gradients_, pair_gradients, strip_means
from subquad.ops.means.weighted_columns import Columns, Group, column_groups
from subquad.ops.precision import full_precision, wide_dtype
from subquad.ops.recomputed import recomputed


def biased_means_by_pairs(q: Tensor, k: Tensor, v: Tensor, bias: PositionBias | None, reach: BiasReach) -> Tensor:
    """The definition, a weight for every pair and channel. Arguments and result as in `biased_means`."""
    length, total = q.shape[2], k.shape[2]
    offset = total - length
    distance = torch.arange(length, device=q.device)[:, None] + offset - torch.arange(total, device=q.device)
    logits = k[:, :, None].expand(-1, -1, length, -1, -1)
    if bias is not None:
        inside = _at_most(distance, reach.left) & _at_most(-distance, reach.right)
        scores = bias.scores(Strips(range(1), slice(0, length), slice(0, total), offset, reach))[:, :, 0]
        logits = logits + torch.where(inside, scores, 0.0)[..., None]
    if reach.causal:
        logits = logits.masked_fill((distance < 0)[..., None], -torch.inf)
    return q.sigmoid() * (logits.softmax(dim=3) * v[:, :, None]).sum(dim=3)


def biased_means(q: Tensor, k: Tensor, v: Tensor, bias: PositionBias | None, reach: BiasReach) -> Tensor:
    """Gated means, in time proportional to the reach of the bias.

    Args:
        q: (B, G, L, E).
        k: (B, G, S, E), or (B, G, S, 1) for keys that the channels of a group share; `LOG_ZERO` where there is no key.
            The queries are the last L of the S columns; bidirectional: S = L.
        v: (B, G, S, E).
        bias: of the positions; None for none.
        reach: of the bias.

    Returns:
        (B, G, L, E), the dtype of q. A query that has no key itself gets anything finite.
    """
    if bias is None and not reach.causal:
        return recomputed(_gated_mean, q, k, v)
    tensors = () if bias is None else bias.tensors
    return _BiasedMeans.apply(q, k, v, bias, reach, *tensors)  # pyright: ignore[reportReturnType] - apply has no types


def _gated_mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One mean for all queries."""
    wide = wide_dtype(q)
    return (q.to(wide).sigmoid() * (k.to(wide).softmax(dim=2) * v.to(wide)).sum(dim=2, keepdim=True)).to(q.dtype)


class _Parts(NamedTuple):
    """What the backward pass goes on with, small beside the rest.

    Attributes:
        far: the far means of strips.
        groups: of strips whose columns are weighted together, and how they were summed.
    """

    far: Far
    groups: list[tuple[Group, list[Summed]]]


class _BiasedMeans(Function):
    """Keeps q, k, v, the means before the gate and their levels."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: PositionBias | None, reach: BiasReach, *tensors: Tensor
    ) -> Tensor:
        wide = wide_dtype(q)
        wide_bias = None if bias is None else bias.of(*(tensor.to(wide) for tensor in tensors))
        with full_precision(q.device):
            kept, ctx.parts = _means(k.to(wide), v.to(wide), wide_bias, reach, q.shape[2])
        ctx.bias = None if bias is None else bias.of(*(tensor.new_empty(0) for tensor in tensors))
        ctx.save_for_backward(q, k, v, *kept, *tensors)
        return q.to(wide).sigmoid().mul_(kept.mean).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, level, mean, *tensors = ctx.saved_tensors
        wide = mean.dtype
        bias = None if ctx.bias is None else ctx.bias.of(*(tensor.to(wide) for tensor in tensors))
        upstream = Upstream(q, grad, SavedMeans(level, mean), _real_queries(k, q.shape[2]))
        with full_precision(q.device):
            of_q, of_k, of_v, *of_bias = _gradients(k.to(wide), v.to(wide), bias, upstream, ctx.parts)
        of_tensors = (found.to(tensor.dtype) for found, tensor in zip(of_bias, tensors, strict=True))
        return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype), None, None, *of_tensors


def _real_queries(k: Tensor, length: int) -> Tensor | None:
    """Which queries have a key themselves, (B, G, L, 1); None for all."""
    real = k[:, :, k.shape[2] - length :, :1] > LOG_ZERO / 2
    return None if bool(real.all()) else real


def _means(
    k: Tensor, v: Tensor, bias: PositionBias | None, reach: BiasReach, length: int
) -> tuple[SavedMeans, _Parts | None]:
    """Means for all queries, and what they are made of if not running means."""
    if bias is None:
        start = k.shape[2] - length
        return SavedMeans(*(x[:, :, start:] for x in running_means(k, v))), None
    tokens, singles = Tokens(k, v, bias), strips(length, k.shape[2], reach)
    result = SavedMeans(
        k.new_empty((*k.shape[:2], length, k.shape[3])), v.new_empty((*v.shape[:2], length, v.shape[3]))
    )
    parts = _Parts(Far.of(k, v, singles), [])
    for group in column_groups(k, singles):
        columns = Columns.weigh(k, v, group)
        summed = [strip_means(tokens, several, columns, parts.far, result) for several in group.strips]
        parts.groups.append((group, list(chain.from_iterable(summed))))
        del columns  # its memory goes to the next group, fresh memory takes longer
    return result, parts


def _gradients(
    k: Tensor, v: Tensor, bias: PositionBias | None, upstream: Upstream, parts: _Parts | None
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and what the bias is made of.

    With the logarithm total_i of all weights of a query, that of a pair is exp(k_j + w_ij - total_i), whatever part of
    the sums it was in.
    """
    of_q = torch.empty_like(upstream.kept.mean)
    if bias is None or parts is None:
        wanted = upstream.through_gate(of_q)
        return of_q, *running_gradients(k, v, upstream.kept.level, wanted.grad, wanted.of_weights)
    tokens, of_bias = Tokens(k, v, bias), tuple(map(torch.zeros_like, bias.tensors))
    of_k, of_v = torch.zeros_like(k), torch.zeros_like(v)
    far, of_weighted = (parts.far, parts.far.zeros()), v.new_empty(0)
    for group, summed in parts.groups:
        columns = Columns.weigh(k, v, group)
        of_weighted = _zeros(columns.weighted.shape, of_weighted)
        of_means = upstream.of(group.queries).through_gate(of_q[:, :, group.queries])
        for several, top in summed:
            first, last = several.queries.start - group.queries.start, several.queries.stop - group.queries.start
            wanted = of_means.of(slice(first, last))
            if top is not None:
                of_scores = add_strip_gradients_(of_weighted, tokens, several, columns, far, wanted, top)
            else:
                more_k, more_v, of_scores = pair_gradients(tokens, several, far, wanted)
                of_k[:, :, several.columns] += more_k
                of_v[:, :, several.columns] += more_v
            bias.add_gradients(of_bias, of_scores, several)
        columns.add_gradients_((of_k, of_v), of_weighted)
        del columns, of_means
    parts.far.add_gradients_((of_k, of_v), k, v, far[1])
    return of_q, of_k, of_v, *of_bias


def _zeros(shape: torch.Size, before: Tensor) -> Tensor:
    """Zeros, in the memory of a tensor that isn't needed any more if it has that shape: fresh memory takes longer."""
    return before.zero_() if before.shape == shape else before.new_zeros(shape)


def _at_most(distance: Tensor, bound: int | None) -> Tensor:
    return torch.ones_like(distance, dtype=torch.bool) if bound is None else distance <= bound
