"""Weighted means of everything so far, for each channel, with weights that are given by their logarithms.

    mean_t = Σ_{s<=t} exp(a_s) x_s / Σ_{s<=t} exp(a_s)        total_t = log Σ_{s<=t} exp(a_s)

A mean and the logarithm of its weight are all that has to be known to go on, or to join it to another mean. No weight
is taken relative to a later one, so that a huge one changes nothing before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NOTHING = -1e30
"""The logarithm of a weight of 0: finite, so that means of nothing are no NaN, and lost beside any real one."""

CHUNK = 64
"""Tokens of a chunk; all chunks go on by one token at a time, so their number should be of the same size."""


class Means(NamedTuple):
    """Weighted means.

    Attributes:
        total: (B, G, L, X), the logarithms of the summed weights; X is 1 where the channels share them.
        of: means (B, G, L, ·), one tensor for each that was given.
    """

    total: Tensor
    of: tuple[Tensor, ...]


def running_means_by_tokens(log_weights: Tensor, *values: Tensor) -> Means:
    """The definition: a mean for each prefix. Arguments and result as in `running_means`."""
    totals, means = [], []
    for t in range(log_weights.shape[2]):
        seen = log_weights[:, :, : t + 1]
        totals.append(seen.logsumexp(dim=2))
        means.append([(seen.softmax(dim=2) * x[:, :, : t + 1]).sum(dim=2) for x in values])
    return Means(torch.stack(totals, dim=2), tuple(torch.stack(x, dim=2) for x in zip(*means, strict=True)))


def running_means(log_weights: Tensor, *values: Tensor) -> Means:
    """Means of all prefixes; no gradient.

    Args:
        log_weights: (B, G, L, X), float32 or wider; `NOTHING` for a weight of 0.
        *values: (B, G, L, ·) each, the last dimension X, or any where X is 1.
    """
    length = log_weights.shape[2]
    steps = min(CHUNK, length)
    inside = _inside_chunks(
        _in_chunks(log_weights, steps, NOTHING), tuple(_in_chunks(x, steps, 0.0) for x in values), steps
    )
    if length > steps:
        join_(inside, _before_chunks(inside))
    return Means(inside.total.flatten(2, 3)[:, :, :length], tuple(x.flatten(2, 3)[:, :, :length] for x in inside.of))


def join_(first: Means, second: Means) -> Means:
    """Means of what two means are of, written into the first; shapes broadcast."""
    total = torch.logaddexp(first.total, second.total)
    share = (second.total - total).exp_()
    for mine, other in zip(first.of, second.of, strict=True):
        mine.lerp_(other.expand_as(mine), share.expand_as(mine))
    first.total.copy_(total)
    return first


def _inside_chunks(log_weights: Tensor, values: tuple[Tensor, ...], steps: int) -> Means:
    """Running means that begin anew in each chunk; all tensors (B, G, N, T, ·)."""
    result = Means(torch.empty_like(log_weights), tuple(torch.empty_like(x) for x in values))
    result.total[..., 0, :] = log_weights[..., 0, :]
    for x, mean in zip(values, result.of, strict=True):
        mean[..., 0, :] = x[..., 0, :]
    for t in range(1, steps):
        _advance(result, log_weights, values, t)
    return result


def _advance(result: Means, log_weights: Tensor, values: tuple[Tensor, ...], t: int) -> None:
    """Place t of every chunk."""
    own = log_weights[..., t, :]
    total = torch.logaddexp(result.total[..., t - 1, :], own)
    result.total[..., t, :] = total
    share = (own - total).exp_()
    for x, mean in zip(values, result.of, strict=True):
        torch.lerp(mean[..., t - 1, :], x[..., t, :], share.expand_as(x[..., t, :]), out=mean[..., t, :])


def _before_chunks(inside: Means) -> Means:
    """What lies before each chunk: (B, G, N, 1, ·)."""
    lasts = Means(inside.total[..., -1, :], tuple(x[..., -1, :] for x in inside.of))
    count = lasts.total.shape[2]
    before = _inside_chunks(lasts.total, lasts.of, count)
    total = F.pad(before.total[:, :, :-1], (0, 0, 1, 0), value=NOTHING)
    return Means(total[..., None, :], tuple(F.pad(x[:, :, :-1], (0, 0, 1, 0))[..., None, :] for x in before.of))


def _in_chunks(x: Tensor, steps: int, filling: float) -> Tensor:
    """(B, G, L, ·) -> (B, G, N, T, ·)."""
    missing = -x.shape[2] % steps
    padded = F.pad(x, (0, 0, 0, missing), value=filling) if missing else x
    return padded.contiguous().unflatten(2, (-1, steps))


def earlier_means(k: Tensor, v: Tensor, start: int, length: int) -> Means:
    """For each of `length` queries the mean over columns 0..start + i; `start` may be below 0.

    Args:
        k: (B, G, S, E or 1), logarithms of weights.
        v: (B, G, S, E).
        start: what the first query sees last.
        length: L.
    """
    nothing = max(0, -start)
    running = running_means(*(x[:, :, : max(0, start + length)] for x in (k, v)))
    return _map(running, lambda x, filling: _pad_first(x[:, :, max(0, start) :], nothing, filling))


def earlier_gradients(
    k: Tensor, v: Tensor, start: int, inverse: Tensor, grad: Tensor, of_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v by the columns 0..start + i of each query: sums over the queries that see a column.

    Args:
        k: (B, G, S, E or 1).
        v: (B, G, S, E).
        start: what the first query sees last.
        inverse: (B, G, L, E or 1), the logarithms of the inverse of all weights of a query; `NOTHING` to leave it out.
        grad: (B, G, L, E), of the means.
        of_weights: (B, G, L, E or 1), grad times mean, summed over the channels that share k.
    """
    length, total = grad.shape[2], k.shape[2]
    running = running_means(*(x.flip(2) for x in (inverse, grad, of_weights)))
    running = _map(running, lambda x, _: x.flip(2))
    first = min(max(0, -start), length)  # queries before it see no column
    seen_by_all = max(0, start)
    later = _map(running, lambda x, filling: _spread(x[:, :, first:], seen_by_all, total, filling))
    weights = (k + later.total).exp_()
    of_v = weights * later.of[0]
    return (of_v * v).sum_to_size(k.shape) - weights * later.of[1], of_v


def _spread(x: Tensor, before: int, total: int, filling: float) -> Tensor:
    """What the queries tell the columns: the first of x to `before` columns, then to each its own, then nothing."""
    own = x[:, :, : total - before]
    parts = (x[:, :, :1].expand(-1, -1, before, -1), own)
    told = torch.cat(parts, dim=2) if before else own
    return F.pad(told, (0, 0, 0, total - told.shape[2]), value=filling)


def _pad_first(x: Tensor, count: int, filling: float) -> Tensor:
    return F.pad(x, (0, 0, count, 0), value=filling) if count else x


def _map(means: Means, change: Callable[[Tensor, float], Tensor]) -> Means:
    """A change of all tensors that is told what stands for nothing."""
    return Means(change(means.total, NOTHING), tuple(change(x, 0.0) for x in means.of))
