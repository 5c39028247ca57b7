"""The streams of Sinkhorn: what a state holds, and what a call leaves of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.interface import Dims
from subquad.ops.sorted_blocks.attention import NullKey
from subquad.ops.sorted_blocks.stream import Arrivals, sort_blocks
from subquad.state import State, state_dataclass


@state_dataclass
class SinkhornState(State):
    """All tokens, what later rows of the sorting matrix depend on, and the block sorted to the last one.

    Columns behind an example's own are zeros.

    Attributes:
        length: int64 (B,).
        input_sum: (B, D), of all tokens.
        column_sums: (B, H, K, N - 1), logarithms of the sums of the sorting matrix's columns over all rows, in each
            iteration, N blocks.
        keys: (B, H, T, E).
        values: (B, H, T, E).
        sorted_keys: (B, H, block, E), of the last block that has a token.
        sorted_values: (B, H, block, E).
    """

    input_sum: Tensor
    column_sums: Tensor
    keys: Tensor
    values: Tensor
    sorted_keys: Tensor
    sorted_values: Tensor


def empty_stream(
    dims: Dims, block: int, iterations: int, batch_size: int, device: torch.device, dtype: torch.dtype
) -> SinkhornState:
    """Nothing seen yet."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(batch_size, *shape, device=device, dtype=dtype)

    tokens = [zeros(dims.num_heads, size, dims.head_dim) for size in (0, 0, block, block)]
    length = torch.zeros(batch_size, dtype=torch.int64, device=device)
    return SinkhornState(length, zeros(dims.embed_dim), zeros(dims.num_heads, iterations, 0), *tokens)


class Known(NamedTuple):
    """A stream with the tokens of a call, in float32 or wider.

    Attributes:
        arrivals: where the tokens are.
        input_sum: (B, D).
        numbers: int64 (B, R), of blocks that begin in this call.
        rows: (B, H, R, N), theirs of the sorting matrix; zeros where a block has no token.
        column_sums: (B, H, K, N - 1).
        own: keys and values in blocks, (B, H, N, block, E).
    """

    arrivals: Arrivals
    input_sum: Tensor
    numbers: Tensor
    rows: Tensor
    column_sums: Tensor
    own: tuple[Tensor, Tensor]

    def last_alone(self) -> Known:
        """With the row of each example's last block alone, in a stream that begins with this call."""
        last = self.arrivals.opened[:, None] - 1
        rows = self.rows.take_along_dim(last.clamp_min(0)[:, None, :, None], dim=2)
        return self._replace(numbers=last, rows=rows)

    def sorted(self, before: SinkhornState, null: NullKey) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, 1 + R, block, E) of the blocks sorted to the last one before and to `numbers`."""
        stored = before.sorted_keys, before.sorted_values
        keys, values = (
            torch.cat((old[:, :, None].to(tokens.dtype), sort_blocks(self.rows, self.numbers, tokens, token)), dim=2)
            for old, tokens, token in zip(stored, self.own, null, strict=True)
        )
        return keys, values

    def next_state(self, before: SinkhornState, other: tuple[Tensor, Tensor]) -> SinkhornState:
        """What the next call needs, of what `sorted` gave."""
        end, dtype = self.arrivals.end, before.keys.dtype
        new = (self.numbers >= self.arrivals.first[:, None]) & (self.numbers < self.arrivals.opened[:, None])
        last = new.sum(dim=1)[:, None, None, None, None]
        tokens = [x.flatten(2, 3)[:, :, : max([0, *end.tolist()])] for x in self.own]
        tokens += [x.take_along_dim(last, dim=2)[:, :, 0] for x in other]
        return SinkhornState(end, *(x.to(dtype) for x in (self.input_sum, self.column_sums, *tokens)))
