"""Which heads of which examples run together, and where their rows are read and written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.combiner.layout import Example
from subquad.ops.partial_softmax import CALL_BYTES
from subquad.ops.precision import wide_dtype

GROUP_BYTES = 2**21
"""Queries of the heads that run together: few enough that they stay in the cache."""


class Group(NamedTuple):
    """Heads that run together, G of them.

    Attributes:
        example: what each is.
        examples: where in the batch it is.
        heads: which heads of each.
    """

    example: Example
    examples: slice
    heads: slice

    def rows(self, x: Tensor, number: int) -> Tensor:
        """(B, H, L, ...) -> (G, number, ...), the first rows; a view where it can be one."""
        return x[self.examples, self.heads, :number].flatten(0, 1)

    def fill_up(self, x: Tensor) -> Tensor:
        """(B, H, L, E) -> (G, padded, E), float32 or wider; a view where that is what it is."""
        x = self.rows(x, self.example.length).to(wide_dtype(x))
        missing = self.example.padded - self.example.length
        return F.pad(x, (0, 0, 0, missing)) if missing else x


class WriteTarget:
    """Where rows (G, padded, ...) of a group are written: in their place, or beside it where they don't fit.

    Args:
        target: (B, H, L, ...).
        some: the group.
        number: rows that are written, where these aren't the tokens.
    """

    def __init__(self, target: Tensor, some: Group, number: int | None = None) -> None:
        number, padded = (some.example.length, some.example.padded) if number is None else (number, number)
        self.place = target[some.examples, some.heads, :number]
        wide, (examples, heads, *_) = wide_dtype(target), self.place.shape
        one_stride = examples == 1 or heads == 1 or self.place.stride(0) == heads * self.place.stride(1)
        self.direct = padded == number and wide == target.dtype and one_stride
        self.rows = self.place.flatten(0, 1) if self.direct else self._beside(padded, wide)

    def _beside(self, padded: int, dtype: torch.dtype) -> Tensor:
        examples, heads, _, *rest = self.place.shape
        return self.place.new_zeros((examples * heads, padded, *rest), dtype=dtype)

    def __enter__(self) -> Tensor:
        return self.rows

    def __exit__(self, *raised: object) -> None:
        if not self.direct:
            self.place.copy_(self.rows[:, : self.place.shape[2]].view(self.place.shape))


def groups_of(q: Tensor, examples: list[Example | None]) -> Iterator[Group]:
    """Heads that run together: of one example, or all heads of examples that are the same and stand side by side."""
    wide, num_heads, start = wide_dtype(q), q.shape[1], 0
    while start < len(examples):
        example, stop = examples[start], start + 1
        if example is not None:
            blocks, size = example.layout.blocks, example.padded * wide.itemsize
            most = GROUP_BYTES // (size * q.shape[-1]) if blocks is None else CALL_BYTES // (size * blocks.columns)
            heads = min(num_heads, max(1, most))
            last = min(len(examples), start + max(1, most // num_heads))
            while stop < last and examples[stop] is example:
                stop += 1
            for head in range(0, num_heads, heads):
                yield Group(example, slice(start, stop), slice(head, head + heads))
        start = stop
