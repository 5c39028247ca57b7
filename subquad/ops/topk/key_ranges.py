"""Which keys the queries of one example may see, where these lie in one piece: causality, padding and documents.

With the invalid keys taken out, what is left to a query is a range of keys, and ranges of later queries don't begin or
end earlier. So a mask is needed at the two edges of a rectangle of queries and keys alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeyRanges(NamedTuple):
    """The keys that queries see.

    Attributes:
        columns: int64 (W,), which keys are valid; None for all.
        first: int64 (L,), non-decreasing, the first of the valid keys that a query sees.
        last: int64 (L,), non-decreasing, the one behind the last.
        width: W.
    """

    columns: Tensor | None
    first: Tensor
    last: Tensor
    width: int

    def piece(self, rows: slice, start: int) -> KeyRanges:
        """The ranges of some queries among the keys from `start` on."""
        return KeyRanges(None, self.first[rows] - start, self.last[rows] - start, self.width - start)


def key_ranges(
    length: int,
    key_length: int,
    *,
    device: torch.device,
    causal: bool = False,
    offset: int = 0,
    valid: Tensor | None = None,
    segments: Tensor | None = None,
    key_segments: Tensor | None = None,
) -> KeyRanges:
    """The ranges of one example.

    Args:
        length: L.
        key_length: S.
        device: of the result.
        causal: query i sees the keys at positions up to i + offset.
        offset: position of the first query.
        valid: bool (S,).
        segments: int (L,), non-decreasing; together with `key_segments`, only equal ones see each other.
        key_segments: int (S,), non-decreasing.
    """
    columns = None if valid is None else valid.nonzero()[:, 0]
    width = key_length if columns is None else columns.shape[0]
    first = torch.zeros(length, dtype=torch.int64, device=device)
    last = torch.full_like(first, width)
    if causal:
        last = (torch.arange(1, length + 1, device=device) + offset).clamp(0, key_length)
        if columns is not None:
            last = torch.searchsorted(columns, last)
    if segments is not None and key_segments is not None:
        of_keys = (key_segments if columns is None else key_segments[columns]).contiguous()
        first = torch.searchsorted(of_keys, segments.contiguous())
        last = torch.minimum(last, torch.searchsorted(of_keys, segments.contiguous(), right=True))
    return KeyRanges(columns, first, last, width)


def hide_(scores: Tensor, ranges: KeyRanges) -> None:
    """Set the scores (..., L, C) of the first C keys to -inf, in place, where the ranges don't reach."""
    first, last = ranges.first, ranges.last
    early, late = slice(0, int(first[-1])), slice(max(0, int(last[0])), scores.shape[-1])
    columns = torch.arange(scores.shape[-1], device=scores.device)
    if early.stop > 0:
        scores[..., early].masked_fill_(columns[early] < first[:, None], -torch.inf)
    if late.start < late.stop:
        scores[..., late].masked_fill_(columns[late] >= last[:, None], -torch.inf)
