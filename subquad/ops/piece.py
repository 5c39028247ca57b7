"""A piece of a compiled pattern, and the tensors that pieces work on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subquad.ops.pattern.example_facts import ExampleFacts

CALL_BYTES = 4 * 2**20
"""Temporaries of one call: small enough to stay in the cache, large enough to keep two threads busy."""


class Work(NamedTuple):
    """Some heads of one example.

    Attributes:
        q: (G, L, E).
        k: (G, S, E).
        v: (G, S, E).
        out: (G, L, E), the merged result so far; in the backward pass the final one.
        lse: (G, L), the merged log-sum-exp so far, -inf where nothing was seen; in the backward pass final and finite.
        facts: what restricts this example.
        offset: absolute position of query 0.
        scale: factor of the scores.
        fresh: whether the queries of the piece have seen no other, so that results are written and not merged.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    facts: ExampleFacts
    offset: int
    scale: float
    fresh: bool


class Gradients(NamedTuple):
    """Gradients beside `Work`: of the results, given, and of the inputs, added up.

    Attributes:
        out: (G, L, E).
        lse: (G, L), or None where nothing depends on the log-sum-exp.
        q: (G, L, E).
        k: (G, S, E).
        v: (G, S, E).
    """

    out: Tensor
    lse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor


class Bias(NamedTuple):
    """A mask as the fused operator takes it.

    Attributes:
        values: 0 where visible, else -inf; (n, heads, rows, columns), any of the first two 1.
        hidden_rows: bool (n, heads, rows), rows in which nothing is visible; None where there are none.
    """

    values: Tensor
    hidden_rows: Tensor | None


class Piece(ABC):
    """Part of a pattern, disjoint from the other parts."""

    @property
    @abstractmethod
    def empty(self) -> bool:
        """Whether nothing is left to compute."""

    @abstractmethod
    def price(self, call_pairs: int) -> float:
        """What it costs for one head, in pairs of dense attention, of which starting a call costs `call_pairs`."""

    @property
    @abstractmethod
    def signature(self) -> Hashable:
        """Equal only for pieces that compute the same, whatever the head; None where that isn't known."""

    @abstractmethod
    def covered(self, length: int) -> NDArray[np.bool_]:
        """Which of `length` queries the piece computes, bool (length,)."""

    @abstractmethod
    def forward(self, work: Work) -> None:
        """Merge this part into `work.out` and `work.lse`."""

    @abstractmethod
    def backward(self, work: Work, gradients: Gradients) -> None:
        """Add this part's share to the gradients of q, k and v."""


def make_bias(visible: Tensor, dtype: torch.dtype, clear: int = 0) -> Bias:
    """The bias of a bool mask (n, heads, rows, columns), behind `clear` columns that all rows see."""
    *batch, rows, columns = visible.shape
    values = torch.zeros(*batch, rows, clear + columns, dtype=dtype)
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
