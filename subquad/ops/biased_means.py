"""Weighted means of values over keys and positions, channel by channel: what is left of attention without products.

    y_i = σ(q_i) ⊙ Σ_j exp(k_j + w_ij) ⊙ v_j / Σ_j exp(k_j + w_ij)

w is a number for a pair of positions, the same for all channels of a group, so that the sums inside its reach are
matrix products of exp(w) with exp(k) ⊙ v and exp(k); outside of it w is 0 and the sums are those of prefixes and
suffixes. A key that a query doesn't see can't hide those that it sees: where a row of the product of both stabilised
factors would be lost, the pairs of that strip are summed one by one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from subquad.ops.position_bias import PositionBias
from subquad.ops.precision import full_precision
from subquad.ops.recomputed import recomputed
from subquad.ops.running_means import NOTHING, Means, earlier_gradients, earlier_means, join_
from subquad.ops.strip_means import backward_strip, strip_means, strips


class Reach(NamedTuple):
    """How far the bias reaches, and what is seen.

    Attributes:
        left: columns before a query; None for all.
        right: columns after it; None for all, 0 in causal means.
        causal: no column after a query is seen; else those beyond `right` are, without a bias.
    """

    left: int | None
    right: int | None
    causal: bool


def biased_means_by_pairs(q: Tensor, k: Tensor, v: Tensor, bias: PositionBias | None, reach: Reach) -> Tensor:
    """The definition, a weight for every pair and channel. Arguments and result as in `biased_means`."""
    length, total = q.shape[2], k.shape[2]
    offset = total - length
    distance = torch.arange(length, device=q.device)[:, None] + offset - torch.arange(total, device=q.device)
    logits = k[:, :, None].expand(-1, -1, length, -1, -1)
    if bias is not None:
        inside = _at_most(distance, reach.left) & _at_most(-distance, reach.right)
        scores = bias.scores(slice(0, length), slice(0, total), offset)
        logits = logits + torch.where(inside, scores, 0.0)[..., None]
    if reach.causal:
        logits = logits.masked_fill((distance < 0)[..., None], -torch.inf)
    return q.sigmoid() * (logits.softmax(dim=3) * v[:, :, None]).sum(dim=3)


def biased_means(q: Tensor, k: Tensor, v: Tensor, bias: PositionBias | None, reach: Reach) -> Tensor:
    """Gated means, in time proportional to the reach of the bias.

    Args:
        q: (B, G, L, E).
        k: (B, G, S, E), or (B, G, S, 1) for keys that the channels of a group share; `NOTHING` where there is no key.
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
    wide = torch.promote_types(q.dtype, torch.float32)
    return (q.to(wide).sigmoid() * (k.to(wide).softmax(dim=2) * v.to(wide)).sum(dim=2, keepdim=True)).to(q.dtype)


class _BiasedMeans(Function):
    """Keeps q, k, v, the means before the gate and the logarithms of their weights."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: PositionBias | None, reach: Reach, *tensors: Tensor
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        wide_bias = None if bias is None else bias.of(*(tensor.to(wide) for tensor in tensors))
        with full_precision(q.device):
            means, ctx.factored = _means(k.to(wide), v.to(wide), wide_bias, reach, q.shape[2])
        ctx.bias, ctx.reach = None if bias is None else bias.of(*(tensor.new_empty(0) for tensor in tensors)), reach
        ctx.save_for_backward(q, k, v, means.total, means.of[0], *tensors)
        return (q.to(wide).sigmoid() * means.of[0]).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, total, mean, *tensors = ctx.saved_tensors
        wide = mean.dtype
        bias = None if ctx.bias is None else ctx.bias.of(*(tensor.to(wide) for tensor in tensors))
        gate, grad = q.to(wide).sigmoid(), grad.to(wide)
        of_q = grad * mean * gate * (1 - gate)
        with full_precision(q.device):
            result = Means(total, (mean,))
            of_k, of_v, *of_bias = _gradients(
                k.to(wide), v.to(wide), bias, ctx.reach, result, grad * gate, ctx.factored
            )
        of_tensors = (found.to(tensor.dtype) for found, tensor in zip(of_bias, tensors, strict=True))
        return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype), None, None, *of_tensors


def _means(k: Tensor, v: Tensor, bias: PositionBias | None, reach: Reach, length: int) -> tuple[Means, list[bool]]:
    """Means for all queries, and which strips were products."""
    start = k.shape[2] - length
    if bias is None:
        return earlier_means(k, v, start, length), []
    result = Means(k.new_empty((*k.shape[:2], length, k.shape[3])), (v.new_empty((*v.shape[:2], length, v.shape[3])),))
    factored = []
    for strip in strips(length, k.shape[2], reach.left, reach.right):
        part, product = strip_means(k, v, bias, strip)
        result.total[:, :, strip.queries], result.of[0][:, :, strip.queries] = part.total, part.of[0]
        factored.append(product)
    if reach.left is not None and start + length > reach.left + 1:
        join_(result, earlier_means(k, v, start - reach.left - 1, length))
    if reach.right is not None and not reach.causal and length > reach.right + 1:
        join_(result, _later_means(k, v, reach.right, length))
    return result, factored


def _gradients(
    k: Tensor,
    v: Tensor,
    bias: PositionBias | None,
    reach: Reach,
    result: Means,
    grad: Tensor,
    factored: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of k, v and what the bias is made of, from that of the means (B, G, L, E).

    With total_i, the weight of a pair is exp(k_j + w_ij - total_i), whatever part of the sums it was in.
    """
    length, start = grad.shape[2], k.shape[2] - grad.shape[2]
    real = k[:, :, start:] > NOTHING / 2
    inverse = torch.where(real, -result.total, NOTHING)
    of_weights = (grad * result.of[0]).sum_to_size(inverse.shape)
    if bias is None:
        return earlier_gradients(k, v, start, inverse, grad, of_weights)
    of_k, of_v, of_bias = torch.zeros_like(k), torch.zeros_like(v), tuple(map(torch.zeros_like, bias.tensors))
    for strip, product in zip(strips(length, k.shape[2], reach.left, reach.right), factored, strict=True):
        found = backward_strip(k, v, bias, strip, result, grad, product=product)
        of_k[:, :, strip.columns] += found.of_k
        of_v[:, :, strip.columns] += found.of_v
        bias.add_gradients(of_bias, found.of_scores, strip.queries, strip.columns, strip.offset)
    if reach.left is not None and start + length > reach.left + 1:
        _add((of_k, of_v), earlier_gradients(k, v, start - reach.left - 1, inverse, grad, of_weights))
    if reach.right is not None and not reach.causal and length > reach.right + 1:
        last_k, last_v, of_last, grad, of_weights = _flip(k, v, inverse, grad, of_weights)
        found = earlier_gradients(last_k, last_v, -reach.right - 1, of_last, grad, of_weights)
        _add((of_k, of_v), _flip(*found))
    return of_k, of_v, *of_bias


def _at_most(distance: Tensor, bound: int | None) -> Tensor:
    return torch.ones_like(distance, dtype=torch.bool) if bound is None else distance <= bound


def _flip(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.flip(2) for tensor in tensors)


def _later_means(k: Tensor, v: Tensor, right: int, length: int) -> Means:
    """For each query the mean over the columns more than `right` after it; there are as many columns as queries."""
    last_k, last_v = _flip(k, v)
    means = earlier_means(last_k, last_v, -right - 1, length)
    return Means(means.total.flip(2), _flip(*means.of))


def _add(sums: tuple[Tensor, ...], more: tuple[Tensor, ...]) -> None:
    for mine, other in zip(sums, more, strict=True):
        mine.add_(other)
