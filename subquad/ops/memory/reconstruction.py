"""Losses that train a compression: how well rows stand for the tokens that they are made of.

    attention:    mean of (A(h, old) - A(h, rows))²      A(h, m) = softmax((h W_q) (m W_k)ᵀ / √E) (m W_v), of every head
    autoencoding: mean of (old - g(rows))²

h are the inputs of the segment at whose end the tokens are compressed. Content alone counts: no positions, no mask.
What trains is the compression, and the decoder g; the projections, h and the old tokens are as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.memory.stream_layout import Compressed, Layout
from subquad.ops.precision import wide_dtype


class Squares(NamedTuple):
    """A sum of squared differences, a scalar in float32 or wider, and how many they are."""

    total: Tensor
    elements: int


def squares(found: Tensor, wanted: Tensor) -> Squares:
    """Squared differences of two tensors, of which the second is as it is."""
    wide = wide_dtype(found)
    return Squares(F.mse_loss(found.to(wide), wanted.detach().to(wide), reduction="sum"), found.numel())


def mean_of(parts: list[Squares], like: Tensor) -> Tensor:
    """The mean over all parts, a scalar on the device of `like`; 0 of nothing."""
    if not parts:
        return torch.zeros((), device=like.device)
    return torch.stack([part.total for part in parts]).sum() / sum(part.elements for part in parts)


def attention_squares(q: Tensor, k: Tensor, v: Tensor, row_k: Tensor, row_v: Tensor) -> Squares:
    """How far reading rows is from reading tokens.

    Args:
        q: (N, H, L, E), as they are; no gradient reaches them.
        k: keys of the tokens (N, H, S, E), likewise.
        v: (N, H, S, E), likewise.
        row_k: (N, H, R, E).
        row_v: (N, H, R, E).
    """
    q = q.detach()
    with torch.no_grad():
        wanted = F.scaled_dot_product_attention(q, k, v)
    return squares(F.scaled_dot_product_attention(q, row_k.to(q.dtype), row_v.to(q.dtype)), wanted)


Project = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Keys and values (N, H, R, E) of rows (N, R, D), with a gradient that reaches the rows alone."""


def attention_parts(layout: Layout, q: Tensor, k: Tensor, v: Tensor, made: Tensor, project: Project) -> list[Squares]:
    """How far reading the rows of a call is from reading its tokens; runs of equal shape run together.

    Args:
        layout: of the call.
        q: (B, H, n, E), of the last n columns, in which every segment begins whose end the call holds.
        k: (B, H, T + L, E), of all columns.
        v: (B, H, T + L, E), likewise.
        made: rows that the call makes (B, R, D).
        project: what makes keys and values of them.
    """
    equal: dict[tuple[int, int, int], list[Compressed]] = defaultdict(list)
    for item in layout.runs():
        equal[item.segment.stop - item.segment.own, item.run.tokens, item.run.rows].append(item)
    parts, before_q = [], k.shape[2] - q.shape[2]
    for (queries, tokens, rows), items in equal.items():
        b = torch.tensor([item.example for item in items], device=q.device)[:, None]
        starts = [
            (layout.column_of(item, item.segment.own) - before_q, layout.column_of(item, item.run.first), item.offset)
            for item in items
        ]
        q_first, first, offset = torch.tensor(starts, device=q.device).unbind(dim=1)
        old_k, old_v = (_columns(tensor.detach(), b, first, tokens) for tensor in (k, v))
        row_k, row_v = project(made[b, offset[:, None] + torch.arange(rows, device=q.device)])
        parts.append(attention_squares(_columns(q, b, q_first, queries), old_k, old_v, row_k, row_v))
    return parts


def _columns(x: Tensor, b: Tensor, first: Tensor, count: int) -> Tensor:
    """From x (B, H, S, E) `count` columns from `first` (int64 (N,)) of the examples b (int64 (N, 1)): (N, H, ·, E)."""
    return x.transpose(1, 2)[b, first[:, None] + torch.arange(count, device=x.device)].transpose(1, 2)


def decoding_parts(layout: Layout, windows: Tensor, made: Tensor, decode: Callable[[Tensor], Tensor]) -> list[Squares]:
    """How far the tokens that are made of rows are from those that the rows are made of.

    Args:
        layout: of the call.
        windows: tokens that rows stand for (B, R, rate, D).
        made: rows (B, R, D), of which an example may fill less.
        decode: makes tokens (N, rate, D) of rows (N, D).
    """
    filled = [(item.example, item.offset + row) for item in layout.runs() for row in range(item.run.rows)]
    if not filled:
        return []
    b, row = torch.tensor(filled, device=made.device).unbind(dim=1)
    return [squares(decode(made[b, row]), windows[b, row])]
