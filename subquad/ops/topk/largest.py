"""The largest entries of every row, by a tournament: most entries are compared once, in vectors, and never again.

A row is folded and only the largest of the entries that come to lie on each other goes on; among these the winners are
found in the same way. The `count` largest entries of the row lie under the `count` largest winners, so that exactly the
largest are found, while torch.topk, whose comparisons are not predictable, sees a few hundred entries a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

FOLD = 4
"""Entries that one winner stands for."""

WIDE_FOLD = 8
"""The same in wide rows, where it saves passes over all entries."""


def largest_by_topk(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The definition; arguments and result as in `largest`."""
    values, columns = scores.topk(count, dim=1)
    return values, columns


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest entries of every row.

    Args:
        scores: (N, W), the last stride 1; -inf is the smallest entry.
        count: at most W.

    Returns:
        values (N, count) in descending order, and their columns, int64 (N, count). Which of several equal entries are
        found is not defined.
    """
    return _largest(scores, count, in_order=True)


def _largest(scores: Tensor, count: int, *, in_order: bool) -> tuple[Tensor, Tensor]:
    """As `largest`, in any order unless asked for."""
    fold = WIDE_FOLD if scores.shape[1] >= 64 * count else FOLD
    width = scores.shape[1] // fold
    if width <= count:
        values, columns = scores.topk(count, dim=1, sorted=in_order)
        return values, columns
    _, winners = _largest(scores[:, : fold * width].unflatten(1, (fold, width)).amax(dim=1), count, in_order=False)
    starts = torch.arange(0, fold * width, width, device=scores.device)
    columns = (winners[:, None] + starts[:, None]).flatten(1)
    if fold * width < scores.shape[1]:
        rest = torch.arange(fold * width, scores.shape[1], device=scores.device)
        columns = torch.cat((columns, rest.expand(scores.shape[0], -1)), dim=1)
    values, places = scores.gather(1, columns).topk(count, dim=1, sorted=in_order)
    return values, columns.gather(1, places)
