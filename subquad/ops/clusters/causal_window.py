"""Causal attention to the last tokens of the own cluster.

    o_i = softmax over the last w tokens of i's cluster at or before i, of τ q_i · k_j

Tokens are sorted by cluster and, inside, by position; there the window is a band, cut off where its cluster begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.fused import fused_backward, fused_forward
from subquad.ops.packing import token_counts
from subquad.ops.partial_softmax import CALL_BYTES, add_stack, stack
from subquad.ops.precision import wide_dtype
from subquad.ops.softmax import softmax_attention_with_lse

ROWS = 64
"""Queries of a strip of the band."""
FOREIGN = -1e30
"""Added to the scores of other clusters' keys, whose exponentials are then exactly 0.

It is finite since these pairs are computed: the price is that of the band, which doesn't depend on the clusters.
"""


def window_attention_by_pairs(
    q: Tensor, k: Tensor, v: Tensor, labels: Tensor, window: int, *, scale: float, valid: Tensor | None = None
) -> Tensor:
    """The definition, quadratic in L. Arguments and result as in `cluster_window_attention`."""
    same = labels[..., None] == labels[..., None, :]
    if valid is not None:
        same = same & valid[:, None, None, :] & valid[:, None, :, None]
    earlier = same.tril()
    later_members = earlier.flip(-1).cumsum(dim=-1).flip(-1)  # how many members stand at j..i
    return softmax_attention_with_lse(q, k, v, earlier & (later_members <= window), scale)[0].to(v.dtype)


def cluster_window_attention(
    q: Tensor, k: Tensor, v: Tensor, labels: Tensor, window: int, *, scale: float, valid: Tensor | None = None
) -> Tensor:
    """Causal attention to the last tokens of the own cluster.

    Autograd keeps q, k, v, the labels, the result and its log-sum-exp.

    Args:
        q: (B, H, L, E).
        k: (B, H, L, E).
        v: (B, H, L, E).
        labels: int64 (B, H, L), the cluster of each token.
        window: w, tokens that are seen, the token itself included.
        scale: τ.
        valid: bool (B, L), the valid tokens first.

    Returns:
        (B, H, L, E), the dtype of v; 0 at invalid tokens.
    """
    return _ClusterWindow.apply(q, k, v, labels, window, scale, token_counts(q, valid))  # pyright: ignore[reportReturnType] - apply has no types


class Strip(NamedTuple):
    """Neighbouring stretches of equally many queries of the sorted sequence.

    Attributes:
        first: the first query.
        count: stretches.
        rows: queries of each.
    """

    first: int
    stretches: int
    rows: int

    def cut(self, x: Tensor, more: int) -> Tensor:
        """Rows of x (L + more, E), `more` beyond each stretch: (stretches, 1, rows + more, E), views that overlap."""
        return stack(x[None], self.first, self.rows + more, self.stretches, self.rows)


class Band:
    """The window of one sequence in sorted order."""

    def __init__(self, labels: Tensor, window: int) -> None:
        """Labels: int64 (L,)."""
        self.length = len(labels)
        self.reach = min(window, self.length) - 1
        self.order = labels.argsort(stable=True)
        ordered, place = labels[self.order], torch.arange(self.length, device=labels.device)
        opens = torch.ones_like(ordered, dtype=torch.bool)
        opens[1:] = ordered[1:] != ordered[:-1]
        self.start = torch.where(opens, place, 0).cummax(dim=0).values

    def padded(self, x: Tensor) -> Tensor:
        """Sorted keys (L, E) behind as many zeros as the band reaches back."""
        return F.pad(x, (0, 0, self.reach, 0))

    def strips(self, like: Tensor) -> Iterator[Strip]:
        """As many stretches at a time as keep a call's temporaries in the cache, then what is left."""
        width = 2 * (ROWS + self.reach) * like.shape[1] + ROWS * (ROWS + self.reach)
        size, whole = max(1, CALL_BYTES // (width * like.element_size())), self.length // ROWS
        for first in range(0, whole, size):
            yield Strip(first * ROWS, min(size, whole - first), ROWS)
        if rest := self.length % ROWS:
            yield Strip(whole * ROWS, 1, rest)

    def bias(self, strip: Strip, dtype: torch.dtype) -> Tensor:
        """What is added to the scores: (stretches, 1, rows, rows + reach)."""
        place = torch.arange(max(strip.stretches * strip.rows, strip.rows + self.reach), device=self.start.device)
        row, column = place[: strip.rows, None], place[: strip.rows + self.reach]
        band = torch.zeros(strip.rows, strip.rows + self.reach, dtype=dtype, device=place.device)
        band.masked_fill_((column < row) | (column > row + self.reach), -torch.inf)
        queries = strip.first + place[: strip.stretches * strip.rows].view(strip.stretches, strip.rows)
        keys = queries[:, :1, None] - self.reach + column
        bias = torch.where(keys < self.start[queries][..., None], FOREIGN, band)
        if strip.first < self.reach:
            bias.masked_fill_(keys < 0, -torch.inf)
        return bias.masked_fill_(band.isneginf(), -torch.inf)[:, None]


class _ClusterWindow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, labels: Tensor, window: int, scale: float, lengths: list[int]
    ) -> Tensor:
        wide = wide_dtype(q)
        out, lse = torch.zeros_like(v), q.new_zeros(q.shape[:3], dtype=wide)
        for b, h, length in _sequences(q, lengths):
            band = Band(labels[b, h, :length], window)
            sorted_q, sorted_k, sorted_v = (x[b, h].to(wide)[band.order] for x in (q, k, v))
            found, found_lse = torch.empty_like(sorted_q), torch.empty_like(sorted_q[:, 0])
            keys, values = (band.padded(x) for x in (sorted_k, sorted_v))
            for strip in band.strips(found):
                part_k, part_v = (strip.cut(x, band.reach) for x in (keys, values))
                bias = band.bias(strip, wide)
                part, part_lse = fused_forward(strip.cut(sorted_q, 0), part_k, part_v, scale, bias)
                strip.cut(found, 0).copy_(part)
                strip.cut(found_lse[:, None], 0).copy_(part_lse[..., None])
            out[b, h, band.order] = found.to(v.dtype)
            lse[b, h, :length] = found_lse  # in sorted order
        ctx.save_for_backward(q, k, v, labels, out, lse)
        ctx.window, ctx.scale, ctx.lengths = window, scale, lengths
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        q, k, v, labels, out, lse = ctx.saved_tensors
        wide, grads = lse.dtype, [torch.zeros_like(x) for x in (q, k, v)]
        for b, h, length in _sequences(q, ctx.lengths):
            band = Band(labels[b, h, :length], ctx.window)
            tensors = [x[b, h].to(wide)[band.order] for x in (grad_out, q, k, v, out)]
            keys, values = (band.padded(x) for x in tensors[2:4])
            of_q, of_k, of_v = torch.empty_like(tensors[1]), torch.zeros_like(keys), torch.zeros_like(values)
            for strip in band.strips(of_q):
                upstream, rows, found = (strip.cut(tensors[index], 0) for index in (0, 1, 4))
                part_k, part_v = (strip.cut(x, band.reach) for x in (keys, values))
                row_lse = strip.cut(lse[b, h, :length, None], 0)[..., 0]
                bias = band.bias(strip, wide)
                parts = fused_backward(upstream, rows, part_k, part_v, found, row_lse, ctx.scale, bias)
                strip.cut(of_q, 0).copy_(parts[0])
                for total, part in ((of_k, parts[1]), (of_v, parts[2])):
                    add_stack(total[None], part, strip.first, strip.rows)
            for target, total in zip(grads, (of_q, of_k[band.reach :], of_v[band.reach :]), strict=True):
                target[b, h, band.order] = total.to(target.dtype)
        return *grads, None, None, None, None


def _sequences(q: Tensor, lengths: list[int]) -> Iterator[tuple[int, int, int]]:
    """Example, head and length of every sequence that isn't empty."""
    return ((b, h, length) for b, length in enumerate(lengths) if length for h in range(q.shape[1]))
