"""Columns for the tokens of a stream that is cut into blocks: padding takes none, and a document begins with a block.

size 4, a document of 5 tokens, one of 2:        a a a a | a · · · | b b
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.packing import append, take


class BlockColumns(NamedTuple):
    """Where the tokens of a call stand, counted from the first free column of a stream.

    Attributes:
        columns: int64 (B, L), without meaning for invalid tokens.
        documents: int64 (B, L), 0 for the document that goes on, then 1, 2, ...
        valid: bool (B, L), the valid tokens first.
        width: columns that the valid tokens of the longest row need, at least 1.
    """

    columns: Tensor
    documents: Tensor
    valid: Tensor
    width: int

    def end(self) -> tuple[Tensor, Tensor]:
        """The column behind the last valid token, and the document of that token, each (B,); 0 without one."""
        behind = (self.columns + 1).masked_fill(~self.valid, 0).amax(dim=1)
        return behind, self.documents.masked_fill(~self.valid, 0).amax(dim=1)

    def spread(self, x: Tensor) -> Tensor:
        """Tokens x (B, H, L, E) or (B, L) put into their columns (`width` of them); 0 where no token stands."""
        nothing = x[:, :, :0] if x.ndim == 4 else x[:, :0]
        return append(nothing, x, self.columns.masked_fill(~self.valid, self.width), self.width)

    def collect(self, x: Tensor) -> Tensor:
        """Inverse of `spread`; something for invalid tokens too."""
        return take(x, self.columns.clamp_max(self.width - 1))


def block_columns(
    valid: Tensor, segments: Tensor | None, size: int, *, last_segment: Tensor, place: Tensor
) -> BlockColumns:
    """Put each token behind the one before it, and each document's first one at the start of a block.

    Args:
        valid: bool (B, L), the valid tokens first.
        segments: int (B, L), non-decreasing, or None for one document that goes on.
        size: tokens of a block.
        last_segment: int (B,), the document that may go on.
        place: int64 (B,), place in its block of the first free column.
    """
    index = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
    if segments is None:
        return BlockColumns(index, torch.zeros_like(index), valid, max(1, index.shape[1]))
    opens = torch.cat((last_segment[:, None], segments), dim=1).diff(dim=1) != 0
    earlier = -place[:, None]  # where the block began in which the call goes on
    begins = torch.where(opens, index, earlier).cummax(dim=1).values
    used = index - torch.cat((earlier, begins[:, :-1]), dim=1)  # since the document before began
    columns = index + torch.where(opens, -used % size, 0).cumsum(dim=1)
    placed = BlockColumns(columns, opens.cumsum(dim=1), valid, 1)
    return placed._replace(width=max([1, *placed.end()[0].tolist()]))
