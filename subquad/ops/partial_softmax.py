"""Softmax over part of the keys: masks, exact merging by log-sum-exp, overlapping stretches, and the size of a call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CALL_BYTES = 4 * 2**20
"""Temporaries of one call: small enough to stay in the cache, large enough to keep two threads busy."""


class Bias(NamedTuple):
    """A mask as the fused operator takes it.

    Attributes:
        values: 0 where visible, else -inf; (n, heads, rows, columns), any of the first two 1.
        hidden_rows: bool (n, heads, rows), rows in which nothing is visible; None where there are none.
    """

    values: Tensor
    hidden_rows: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> Bias:
        """The same for scores of this dtype, on this device."""
        hidden = None if self.hidden_rows is None else self.hidden_rows.to(device)
        return Bias(self.values.to(device, dtype), hidden)


def make_bias(visible: Tensor, dtype: torch.dtype, clear: int = 0) -> Bias:
    """The bias of a bool mask (n, heads, rows, columns), behind `clear` columns that all rows see."""
    *batch, rows, columns = visible.shape
    values = visible.new_zeros(*batch, rows, clear + columns, dtype=dtype)
    values[..., clear:].masked_fill_(~visible, -torch.inf)
    hidden = ~visible.any(dim=-1)
    return Bias(values, None if clear or not bool(hidden.any()) else hidden)


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, *, fresh: bool) -> None:
    """Merge a softmax over further keys into `out` and `lse`, in place and exactly; only write it if they are fresh."""
    if fresh:
        out.copy_(part)
        lse.copy_(part_lse)
        return
    total = torch.logaddexp(lse, part_lse)
    weight = torch.where(total == -torch.inf, 0.0, (part_lse - total).exp())
    out.lerp_(part, weight[..., None])
    lse.copy_(total)


def stack(x: Tensor, first: int, size: int, count: int, step: int, chosen: slice = slice(None)) -> Tensor:
    """(U, length, ...) -> (count, U, size, ...): views that may overlap, from `first` on, `step` apart.

    `chosen` are some of the sequences.
    """
    sequence, position, *rest = x.stride()
    start, stop, _ = chosen.indices(x.shape[0])
    shape, strides = (count, stop - start, size, *x.shape[2:]), (step * position, sequence, position, *rest)
    return x.as_strided(shape, strides, x.storage_offset() + start * sequence + first * position)


def add_stack(target: Tensor, stacked: Tensor, first: int, step: int) -> None:
    """Add stretches (count, U, size, E) that may overlap to a sequence (U, length, E), in parts that don't overlap."""
    count, _, size, _ = stacked.shape
    width = size if count == 1 else step
    for start in range(0, size, width):
        part = stacked[:, :, start : start + width]
        stack(target, first + start, part.shape[2], count, step).add_(part)


def share_out(count: int, size: int) -> Iterator[slice]:
    """Ranges of `count` items for one call each, about `size` long, that leave no thread waiting for another.

    The fused operator gives each thread whole items: five on two threads take as long as six.
    """
    threads = torch.get_num_threads()
    size = _round_up(size, threads)
    calls = -(-count // size)
    size = _round_up(-(-count // calls), threads)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _round_up(size: int, unit: int) -> int:
    return max(1, -(-size // unit)) * unit
