"""Attention of the later tokens of a stream to their own blocks and to those sorted to them.

A row of the sorting matrix is made when the first token of its block arrives, for then all that it depends on is known:
the earlier blocks are whole. The block that is sorted to the last, open block is kept for the tokens to come.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.packing import append, take
from subquad.ops.sorted_blocks.attention import attend_block
from subquad.ops.sorted_blocks.fused import Combine


class Arrivals(NamedTuple):
    """The tokens of a call among the blocks of a stream.

    Attributes:
        start: int64 (B,), valid tokens before.
        end: int64 (B,), valid tokens with this call's, which stand in front of its invalid ones.
        tokens: L, of this call, valid or not.
        block: tokens of a block.
    """

    start: Tensor
    end: Tensor
    tokens: int
    block: int

    @property
    def first(self) -> Tensor:
        """Blocks that were open or whole before, int64 (B,)."""
        return _blocks(self.start, self.block)

    @property
    def opened(self) -> Tensor:
        """Blocks that are now, int64 (B,)."""
        return _blocks(self.end, self.block)

    @property
    def capacity(self) -> int:
        """N, blocks of the longest example if all its tokens were valid."""
        return int(_blocks(self.start + self.tokens, self.block).max()) if len(self.start) else 0

    def new_blocks(self) -> Tensor:
        """Numbers of the blocks that begin in this call, int64 (B, R), R for the example in which most could begin.

        Those of `opened` and above hold no token.
        """
        many = _blocks(self.start + self.tokens, self.block) - self.first
        return self.first[:, None] + torch.arange(max([0, *many.tolist()]), device=self.start.device)

    def descriptors(self, earlier: Tensor, x: Tensor) -> Tensor:
        """Sums of all tokens up to the first of each new block, as `block_descriptors` has them.

        Args:
            earlier: (B, D), the sum of the tokens before.
            x: (B, L, D), zeros at invalid tokens, the same dtype.

        Returns:
            (B, R, D).
        """
        sums = earlier[:, None] + x.cumsum(dim=1)
        columns = (self.new_blocks() * self.block - self.start[:, None]).clamp(0, self.tokens - 1)
        return sums.gather(1, columns[..., None].expand(-1, -1, x.shape[2]))

    def join(self, stored: Tensor, new: Tensor) -> Tensor:
        """The stored tokens (B, H, T, E) and the new ones (B, H, L, E) in blocks (B, H, N, block, E), zeros behind."""
        room = self.capacity * self.block
        places = self.start[:, None] + torch.arange(self.tokens, device=new.device)
        places = places.masked_fill(places >= self.end[:, None], room)
        return append(stored.to(new.dtype), new, places, room).unflatten(2, (self.capacity, self.block))


def _blocks(tokens: Tensor, block: int) -> Tensor:
    return (tokens + block - 1) // block


def sort_blocks(rows: Tensor, numbers: Tensor, blocks: Tensor, null: Tensor) -> Tensor:
    """The blocks that are sorted to some places.

    Args:
        rows: (B, H, R, M), of the sorting matrix; M at most N, and 0 for blocks that aren't whole.
        numbers: int64 (B, R), the places.
        blocks: (B, H, N, block, E).
        null: (H, E), what stands in place 0.

    Returns:
        (B, H, R, block, E).
    """
    tokens = blocks[:, :, : rows.shape[3]].flatten(3)
    found = (rows.to(tokens.dtype) @ tokens).unflatten(3, blocks.shape[3:])
    first = (numbers == 0)[:, None, :, None, None]
    return torch.where(first, null.to(found.dtype)[None, :, None, None], found)


def attend_arrivals(
    q: Tensor, own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], arrivals: Arrivals, combine: Combine
) -> Tensor:
    """Attention of the tokens of a call.

    Args:
        q: (B, H, L, E).
        own: keys and values of the stream in blocks, (B, H, N, block, E).
        other: keys and values (B, H, 1 + R, block, E) of the blocks sorted to the last one before and to the new ones.
        arrivals: where the tokens are.
        combine: how own and sorted keys are put together.

    Returns:
        (B, H, L, E); anything at invalid tokens.
    """
    block, start = arrivals.block, arrivals.start[:, None]
    numbers = arrivals.first[:, None] - 1 + torch.arange(other[0].shape[2], device=q.device)
    begin = torch.maximum(numbers * block, start)  # the first query of each block
    width = min(block, arrivals.tokens)
    columns = (begin - start)[..., None] + torch.arange(width, device=q.device)
    queries = take(q, columns.clamp_max(arrivals.tokens - 1))
    places = (begin - numbers * block)[..., None] + torch.arange(width, device=q.device)
    seen = torch.arange(block, device=q.device) <= places[..., None]
    chosen = numbers.clamp(0, arrivals.capacity - 1)
    near_k, near_v = (take(x.flatten(3), chosen).unflatten(3, x.shape[3:]) for x in own)
    found = attend_block(queries, (near_k, near_v), other, seen[:, None], combine)
    positions = start + torch.arange(arrivals.tokens, device=q.device)
    slots = positions // block - arrivals.first[:, None] + 1
    return take(found.flatten(2, 3), slots * width + positions - begin.gather(1, slots))
