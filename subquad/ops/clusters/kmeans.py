"""Clusters of vectors by k-means, with centroids that are moving averages.

    nearest:   c(x) = argmax_c x · μ_c
    members:   of a centroid, the w vectors with the largest x · μ_c
    update:    n_c <- d n_c + (1 - d) #{x in c},  s_c <- d s_c + (1 - d) Σ_{x in c} x,  μ_c = s_c / ñ_c

with ñ_c = (n_c + ε) / (n + C ε) n, where n = Σ_c n_c. A cluster of n_c = 0, which forgets at once (d = 0) and got no
vector, keeps its μ_c. Choices are constants to the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.choice import chosen
from subquad.ops.precision import wide_dtype

SMOOTHING = 1e-5
"""ε, the value of the official Routing Transformer."""
SLICE_ELEMENTS = 2**20
"""Products of vectors and centroids that are held at a time."""
NORM_EPSILON = 1e-5
"""Added to variances."""


class Centroids(NamedTuple):
    """The moving averages.

    Attributes:
        means: (H, C, E), μ.
        counts: (H, C), n.
        sums: (H, C, E), s.
    """

    means: Tensor
    counts: Tensor
    sums: Tensor


def standardise(x: Tensor) -> Tensor:
    """Each vector of x (..., E) minus its mean, divided by its standard deviation: layer norm without parameters.

    Autograd keeps the result, which is what others keep too, and one number for each vector.
    """
    return _Standardise.apply(x)  # pyright: ignore[reportReturnType] - apply has no types


class _Standardise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = x.to(wide_dtype(x))
        centred = wide - wide.mean(dim=-1, keepdim=True)
        factor = (centred.square().mean(dim=-1, keepdim=True) + NORM_EPSILON).rsqrt()
        out = (centred * factor).to(x.dtype)
        ctx.save_for_backward(out, factor)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        out, factor = ctx.saved_tensors
        wide, grad = out.to(factor.dtype), grad.to(factor.dtype)
        along = wide * (grad * wide).mean(dim=-1, keepdim=True)
        return ((grad - grad.mean(dim=-1, keepdim=True) - along) * factor).to(out.dtype)


@torch.no_grad()
def nearest(x: Tensor, means: Tensor) -> Tensor:
    """The centroid (H, C, E) with the largest product with each vector of x (B, H, L, E): int64 (B, H, L)."""
    wide = means.to(wide_dtype(x))
    rows = max(1, SLICE_ELEMENTS // max(1, x.shape[0] * means.shape[0] * means.shape[1]))
    parts = [(part.to(wide.dtype) @ wide.mT).max(dim=-1).indices for part in x.split(rows, dim=2)]
    return torch.cat(parts, dim=2)


@torch.no_grad()
def members(x: Tensor, means: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The vectors of x (H, L, E) with the largest products with each centroid of means (H, C, E).

    Returns:
        `count` of them for each centroid, int64 (H, C, count), in order; and what `nearest` gives, int64 (H, L).
    """
    found, labels = chosen(x, partial(_members, means=means, count=count), below=(x.shape[1], means.shape[1]))
    return found, labels


def _members(x: Tensor, means: Tensor, count: int) -> tuple[Tensor, Tensor]:
    wide = means.to(wide_dtype(x))
    size = max(1, SLICE_ELEMENTS // max(1, x.shape[1]))
    found, labels = [], []
    for vectors, centroids in zip(x.to(wide.dtype), wide, strict=True):
        parts, best, label = (
            [],
            vectors.new_full(vectors.shape[:1], -torch.inf),
            torch.zeros(len(vectors), dtype=torch.int64, device=x.device),
        )
        for start in range(0, len(centroids), size):
            products = centroids[start : start + size] @ vectors.T
            parts.append(products.topk(count, dim=-1, sorted=False).indices)
            largest, own = products.max(dim=0)
            label = torch.where(largest > best, own + start, label)
            best = torch.maximum(best, largest)
        found.append(torch.cat(parts))
        labels.append(label)
    return torch.stack(found).sort(dim=-1).values, torch.stack(labels)


@torch.no_grad()
def moved(
    centroids: Centroids, sets: list[Tensor], labels: list[list[Tensor]], lengths: list[int], decay: float
) -> Centroids:
    """The averages after one more batch.

    Args:
        centroids: before.
        sets: vectors (B, H, L, E), of each kind.
        labels: for each kind and example, the nearest centroids of at least the vectors that count, int64 (H, n).
        lengths: for each example, how many of its vectors count, the first ones.
        decay: d.
    """
    means, counts, sums = centroids
    wide = wide_dtype(counts)
    found, found_sums = torch.zeros_like(counts, dtype=wide), torch.zeros_like(sums, dtype=wide)
    for x, nearest_of in zip(sets, labels, strict=True):
        for b, length in enumerate(lengths):
            for h, label in enumerate(nearest_of[b][:, :length]):
                found[h] += torch.bincount(label, minlength=counts.shape[1])
                found_sums[h].index_add_(0, label, x[b, h, :length].to(wide))
    counts = decay * counts.to(wide) + (1 - decay) * found
    sums = decay * sums.to(wide) + (1 - decay) * found_sums
    total = counts.sum(dim=1, keepdim=True)
    smooth = (counts + SMOOTHING) / (total + counts.shape[1] * SMOOTHING) * total
    after = torch.where(counts[..., None] > 0, sums / smooth[..., None], means)
    return Centroids(*(tensor.to(means.dtype) for tensor in (after, counts, sums)))


def commitment(x: Tensor, means: Tensor, labels: list[Tensor], lengths: list[int]) -> Tensor:
    """Mean over all coordinates of the squared distance of vectors from their centroids, which are constants.

    Autograd keeps x and the labels, and no distances.

    Args:
        x: (B, H, L, E).
        means: (H, C, E).
        labels: for each example, the nearest centroids of at least the vectors that count, int64 (H, n).
        lengths: for each example, how many of its vectors count, the first ones.

    Returns:
        A float32 scalar.
    """
    return _Commitment.apply(x, means.clone(), labels, lengths)  # pyright: ignore[reportReturnType] - apply has no types


class _Commitment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, means: Tensor, labels: list[Tensor], lengths: list[int]) -> Tensor:
        ctx.save_for_backward(x, means, *labels)
        ctx.lengths = lengths
        ctx.numbers = max(1, sum(lengths) * x.shape[1] * x.shape[3])
        total = torch.zeros((), dtype=wide_dtype(x), device=x.device)
        for _, _, distance in _distances(x, means, labels, lengths):
            total += distance.square().sum()
        return (total / ctx.numbers).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        x, means, *labels = ctx.saved_tensors
        grad_x = torch.zeros_like(x)
        for b, h, distance in _distances(x, means, labels, ctx.lengths):
            grad_x[b, h, : len(distance)] = distance * (2 / ctx.numbers * grad)
        return grad_x, None, None, None


def _distances(x: Tensor, means: Tensor, labels: list[Tensor], lengths: list[int]) -> Iterator[tuple[int, int, Tensor]]:
    """Example, head, and what leads from their centroids to its vectors, (n, E)."""
    wide = wide_dtype(x)
    for b, length in enumerate(lengths):
        for h in range(x.shape[1]):
            yield b, h, x[b, h, :length].to(wide) - means[h, labels[b][h, :length]].to(wide)
