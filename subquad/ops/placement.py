"""Where tokens stand for a pattern that counts positions: without padding, and every document on the grid.

An invalid token takes no position. Where a pattern is laid on a grid (blocks, the cells of a stride), every packed
document begins at a multiple of it, so that its tokens see what they would see if it stood alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.mask import Mask, token_positions
from subquad.ops.packing import append, take
from subquad.ops.pattern_attention import pattern_attention
from subquad.patterns.pattern import Pattern


@dataclass(frozen=True)
class Placement:
    """The columns of the tokens of a batch.

    Attributes:
        columns: int64 (B, L), increasing among the valid tokens of a row; those of invalid tokens mean nothing.
        valid: bool (B, L).
        documents: int64 (B, L), the document of each token, counted from 1, or None where no row has several.
        length: number of columns.
        moved: whether any valid token stands in another column than before.
    """

    columns: Tensor
    valid: Tensor
    documents: Tensor | None
    length: int
    moved: bool

    def put(self, x: Tensor) -> Tensor:
        """Tokens x (B, H, L, E) or (B, L) in their columns; what no valid token fills is 0."""
        if not self.moved:
            return x
        nothing = x[:, :, :0] if x.ndim == 4 else x[:, :0]
        return append(nothing, x, self.columns.masked_fill(~self.valid, self.length), self.length)

    def read(self, x: Tensor) -> Tensor:
        """The tokens of x (B, H, columns, E) in their old order; invalid ones read anything."""
        return take(x, self.columns) if self.moved else x

    def mask(self) -> Mask:
        """What is real in the columns, and which document each belongs to."""
        documents = None if self.documents is None else self.put(self.documents).cummax(dim=1).values
        return Mask(self.put(self.valid), documents)

    def of_queries(self, places: Tensor, valid: Tensor, start: Tensor) -> Placement:
        """The placement of queries that are some of the tokens, relative to the first of them.

        Args:
            places: int64 (B, N), which token each query is.
            valid: bool (B, N), which queries are real.
            start: int64 (B,), column of the first real query.
        """
        columns = (take(self.columns, places) - start[:, None]).clamp_min(0)
        documents = None if self.documents is None else take(self.documents, places)
        return _placement(columns, valid, documents)


def place(valid: Tensor, segments: Tensor | None, *, grid: int = 1) -> Placement:
    """Put the valid tokens one behind the other, the first of every document at a multiple of the grid.

    Args:
        valid: bool (B, L).
        segments: int (B, L), non-decreasing.
        grid: the multiple; 1 leaves documents next to each other.
    """
    rank = (valid.cumsum(dim=1) - 1).clamp_min(0)
    if segments is None:
        return _placement(rank, valid, None)
    opens = valid & (token_positions(Mask(valid, segments), *valid.shape, device=valid.device) == 0)
    documents = opens.cumsum(dim=1)
    first = torch.where(opens, rank, 0).cummax(dim=1).values
    earlier_first = F.pad(first[:, :-1], (1, 0))
    gaps = torch.where(opens, (earlier_first - rank) % grid, 0)  # an opening token's rank tells where the last one ends
    placement = _placement(rank + gaps.cumsum(dim=1), valid, documents)
    return placement if bool((documents > 1).any()) else replace(placement, documents=None)


def placed_attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, mask: Mask, *, grid: int = 1) -> Tensor:
    """Self-attention by a pattern that speaks of the tokens' own columns; global tokens are not looked at.

    Args:
        q: (B, H, L, E).
        k: (B, H, L, E).
        v: (B, H, L, E).
        pattern: who attends whom, by column.
        mask: facts about the tokens.
        grid: the multiple at which every document begins.
    """
    if mask.valid is None and (mask.segments is None or grid == 1):
        return pattern_attention(q, k, v, pattern, mask=Mask(segments=mask.segments))
    valid = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if mask.valid is None else mask.valid
    placement = place(valid, mask.segments, grid=grid)
    facts = placement.mask() if placement.moved else Mask(mask.valid, mask.segments)
    q, k, v = (placement.put(tensor) for tensor in (q, k, v))
    return placement.read(pattern_attention(q, k, v, pattern, mask=facts))


def _placement(columns: Tensor, valid: Tensor, documents: Tensor | None) -> Placement:
    before = torch.arange(columns.shape[1], device=columns.device)
    moved = bool((valid & (columns != before)).any())
    last = int(columns.masked_fill(~valid, 0).max()) if columns.numel() else 0
    return Placement(columns, valid, documents, last + 1 if moved else columns.shape[1], moved)
