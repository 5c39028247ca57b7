"""Products with a sparse matrix that has the same number of entries in every row, in both directions.

The matrix of G heads is kept as weights (G, L, N) and the columns that they stand in, int32 (G, L, N). torch's
embedding bag is a fast product of such a matrix; its transpose is one too once the entries are sorted by column.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, in place; a row of nothing but -inf gives 0."""
    largest = scores.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    scores.sub_(largest).exp_()
    return scores.div_(scores.sum(dim=-1, keepdim=True).clamp_min(1.0))  # at least 1 but in such a row


def softmax_backward(weights: Tensor, grad: Tensor) -> Tensor:
    """The gradient of scores from the weights and their gradient."""
    return weights * (grad - (weights * grad).sum(dim=-1, keepdim=True))


def weighted_rows(table: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """The product with a table (G, W, E): (G, L, E)."""
    rows = F.embedding_bag(
        _in_all_heads(columns, table.shape[1]),
        table.flatten(0, 1),
        mode="sum",
        per_sample_weights=weights.flatten(0, 1),
    )
    return rows.unflatten(0, (table.shape[0], -1))


def weights_gradient(table: Tensor, columns: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the weights of `weighted_rows`, (G, L, N), from that of its result (G, L, E)."""
    weights = torch.zeros(columns.shape, dtype=table.dtype, device=table.device, requires_grad=True)
    with torch.enable_grad():
        rows = weighted_rows(table.detach(), columns, weights)
    return torch.autograd.grad(rows, weights, grad)[0]


class PairsByKey(NamedTuple):
    """The entries of a sparse matrix sorted by column.

    Attributes:
        order: int64 (P,), the places of the entries among all P = G * L * N.
        rows: int32 (P,), the row of each, counted over all heads.
        starts: int32 (G * W,), where the entries of each column begin.
    """

    order: Tensor
    rows: Tensor
    starts: Tensor


def pairs_by_key(columns: Tensor, width: int) -> PairsByKey:
    """Sort the entries of a matrix with W = width columns in each head."""
    sorted_columns, order = _in_all_heads(columns, width).flatten().sort(stable=True)
    every = torch.arange(columns.shape[0] * width, dtype=torch.int32, device=columns.device)
    starts = torch.searchsorted(sorted_columns, every, out_int32=True)
    return PairsByKey(order, (order // columns.shape[2]).int(), starts)


def rows_by_key(table: Tensor, pairs: PairsByKey, weights: Tensor) -> Tensor:
    """The product of the transposed matrix with a table (G, L, E): (G, W, E)."""
    rows = F.embedding_bag(
        pairs.rows,
        table.flatten(0, 1),
        pairs.starts,
        mode="sum",
        per_sample_weights=weights.flatten().index_select(0, pairs.order),
    )
    return rows.unflatten(0, (table.shape[0], -1))


def _in_all_heads(columns: Tensor, width: int) -> Tensor:
    """The columns (G * L, N) counted over all heads."""
    if columns.shape[0] == 1:
        return columns[0]
    heads = torch.arange(0, columns.shape[0] * width, width, dtype=columns.dtype, device=columns.device)
    return (columns + heads[:, None, None]).flatten(0, 1)
