"""Weighted means of everything so far, for each channel, with weights that are given by their logarithms.

    mean_t = Σ_{s<=t} exp(a_s) x_s / Σ_{s<=t} exp(a_s)        total_t = log Σ_{s<=t} exp(a_s)

A mean and the logarithm of its weight are all that has to be known to go on. No weight is taken relative to a later
one, so that a huge one changes nothing before it, not in the last bit. Given the totals, means and the gradients of
values alike are sums whose terms fade as the total grows, by factors between 0 and 1:

    mean_t = Σ_{s<=t} exp(total_s - total_t) exp(a_s - total_s) x_s
    of_x_s = exp(a_s - total_s) Σ_{t>=s} exp(total_s - total_t) of_mean_t
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_ZERO = -1e30
"""The logarithm of a weight of 0: finite, so that means of nothing are no NaN, and lost beside any real one."""

CHUNK = 16
"""Tokens of a chunk, at least 2; all chunks go on by one token at a time, and what they end with in the same way."""


class Means(NamedTuple):
    """Weighted means.

    Attributes:
        total: (B, G, L, X), the logarithms of the summed weights; X is 1 where the channels share them.
        mean: (B, G, L, E).
    """

    total: Tensor
    mean: Tensor


def running_means_by_tokens(log_weights: Tensor, values: Tensor) -> Means:
    """The definition: a mean for each prefix. Arguments and result as in `running_means`."""
    totals, means = [], []
    for t in range(log_weights.shape[2]):
        seen = log_weights[:, :, : t + 1]
        totals.append(seen.logsumexp(dim=2))
        means.append((seen.softmax(dim=2) * values[:, :, : t + 1]).sum(dim=2))
    return Means(torch.stack(totals, dim=2), torch.stack(means, dim=2))


def running_means(log_weights: Tensor, values: Tensor) -> Means:
    """Means of all prefixes; no gradient.

    Args:
        log_weights: (B, G, L, X), float32 or wider; `LOG_ZERO` for a weight of 0.
        values: (B, G, L, E); E is X, or X is 1.
    """
    totals = _running_totals(log_weights)
    (means,) = fading_sums_(totals, (log_weights - totals).exp_() * values)
    return Means(totals, means)


def running_gradients(
    log_weights: Tensor, values: Tensor, total: Tensor, grad: Tensor, of_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the logarithms and the values.

    Args:
        log_weights: (B, G, S, X).
        values: (B, G, S, E).
        total: (B, G, L, X), of the last L prefixes.
        grad: (B, G, L, E), of their means; overwritten.
        of_weights: (B, G, L, X), grad times mean, summed over the channels that share weights; overwritten.
    """
    before = values.shape[2] - grad.shape[2]
    sums = (total, *fading_sums_(total, grad, of_weights, backwards=True))
    levels, of_means, of_weights = (_reaching_back(x, before) for x in sums)
    shares = (log_weights - levels).exp_()
    of_values = shares * of_means
    return (of_values * values).sum_to_size(shares.shape).sub_(shares.mul_(of_weights)), of_values


def fading_sums_(levels: Tensor, *values: Tensor, backwards: bool = False) -> tuple[Tensor, ...]:
    """Σ_{s<=t} exp(levels_s - levels_t) x_s for each t, or Σ_{t>=s} exp(levels_s - levels_t) x_t for each s.

    Args:
        levels: (B, G, L, X), never falling.
        *values: x, (B, G, L, ·) each, the last dimension X, or any where X is 1; overwritten.
        backwards: which of the two.
    """
    length = levels.shape[2]
    steps = min(CHUNK, length)
    levels, chunks = _in_chunks(levels, steps, -LOG_ZERO), [_in_chunks(x, steps, 0.0) for x in values]
    fading = (levels[..., :-1, :] - levels[..., 1:, :]).exp_()
    for t in range(1, steps):
        place, last = (-1 - t, -t) if backwards else (t, t - 1)
        for x in chunks:
            x[..., place, :].addcmul_(x[..., last, :], fading[..., last, :])
    if steps < length:
        _join_chunks_(levels, chunks, backwards=backwards)
    return tuple(_in_sequence(x, length) for x in chunks)


def _join_chunks_(levels: Tensor, chunks: list[Tensor], *, backwards: bool) -> None:
    """Add to the sums inside of chunks, (B, G, N, T, ·), what comes from the chunks before or, backwards, behind."""
    edge = 0 if backwards else -1
    edges = levels[..., edge, :]
    carried = fading_sums_(edges, *(x[..., edge, :].contiguous() for x in chunks), backwards=backwards)
    to, source = (slice(None, -1), slice(1, None)) if backwards else (slice(1, None), slice(None, -1))
    difference = edges[:, :, source, None] - levels[:, :, to]
    fading = (difference.neg_() if backwards else difference).exp_()
    for x, more in zip(chunks, carried, strict=True):
        x[:, :, to].addcmul_(more[:, :, source, None], fading)


def _running_totals(log_weights: Tensor) -> Tensor:
    """(B, G, L, X), the logarithms of running sums of weights."""
    length = log_weights.shape[2]
    steps = min(CHUNK, length)
    totals = _in_chunks(log_weights, steps, LOG_ZERO).clone()
    for t in range(1, steps):
        torch.logaddexp(totals[..., t - 1, :], totals[..., t, :], out=totals[..., t, :])
    if steps < length:
        before = _running_totals(totals[..., -1, :])[:, :, :-1, None]
        torch.logaddexp(before, totals[:, :, 1:], out=totals[:, :, 1:])
    return _in_sequence(totals, length)


def _in_chunks(x: Tensor, steps: int, filling: float) -> Tensor:
    """(B, G, L, ·) -> (B, G, N, T, ·), x itself where it is whole and contiguous."""
    missing = -x.shape[2] % steps
    padded = F.pad(x, (0, 0, 0, missing), value=filling) if missing else x
    return padded.contiguous().unflatten(2, (-1, steps))


def _in_sequence(chunks: Tensor, length: int) -> Tensor:
    """(B, G, N, T, ·) -> (B, G, L, ·), with no hidden rest where chunks were filled up."""
    x = chunks.flatten(2, 3)
    return x if x.shape[2] == length else x[:, :, :length].clone()


def _reaching_back(x: Tensor, count: int) -> Tensor:
    """What the first of x holds, for `count` columns before it too."""
    return torch.cat((x[:, :, :1].expand(-1, -1, count, -1), x), dim=2) if count else x
