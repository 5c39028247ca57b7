"""The largest entries of every row, by a tournament: most entries are compared once, in vectors, and never again.

A row is folded into quarters and only the largest of each four entries goes on; among these the winners are found in
the same way. The `count` largest entries of the row are among the fours of the `count` largest winners, so that exactly
the largest are found, while torch.topk, whose comparisons are not predictable, sees a few hundred entries a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

FOLD = 4
"""Entries that one winner stands for."""


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
    values, columns = _largest(scores, count)
    values, order = values.sort(dim=1, descending=True)
    return values, columns.gather(1, order)


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `largest`, in any order."""
    quarter = scores.shape[1] // FOLD
    if quarter <= count:
        values, columns = scores.topk(count, dim=1, sorted=False)
        return values, columns
    folded = scores[:, : FOLD * quarter].unflatten(1, (FOLD, quarter))
    _, winners = _largest(folded.amax(dim=1), count)
    starts = torch.arange(0, FOLD * quarter, quarter, device=scores.device)
    columns = (winners[:, None] + starts[:, None]).flatten(1)
    if FOLD * quarter < scores.shape[1]:
        rest = torch.arange(FOLD * quarter, scores.shape[1], device=scores.device)
        columns = torch.cat((columns, rest.expand(scores.shape[0], -1)), dim=1)
    values, places = scores.gather(1, columns).topk(count, dim=1, sorted=False)
    return values, columns.gather(1, places)
