"""Patterns of whole blocks: block-diagonal, windows of blocks, random blocks."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subquad.patterns.pattern import Classes, Indices, Pattern, Term, Tile


class BlockBand(Pattern):
    """Visible where -ahead <= i // size - j // size <= behind."""

    size: int

    @property
    @abstractmethod
    def reach(self) -> tuple[int, int]:
        """Blocks behind and ahead."""

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """By the distance of blocks."""
        behind, ahead = self.reach
        distance = i // self.size - j // self.size
        return (distance >= -ahead) & (distance <= behind)

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """By interval arithmetic on the distance of blocks."""
        behind, ahead = self.reach
        lowest, highest = i0 // self.size - j1 // self.size, i1 // self.size - j0 // self.size
        some = (lowest <= behind) & (highest >= -ahead)
        everything = (lowest >= -ahead) & (highest <= behind)
        return np.where(some, np.where(everything, Tile.FULL, Tile.PARTIAL), Tile.EMPTY).astype(np.int8)

    def offsets(self) -> tuple[int, int]:
        """The furthest pairs of the furthest blocks."""
        behind, ahead = self.reach
        return -(ahead + 1) * self.size + 1, (behind + 1) * self.size - 1

    @property
    def block(self) -> int:
        """The size."""
        return self.size


@dataclass(frozen=True)
class Block(BlockBand):
    """i // size == j // size."""

    size: int

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_size("Block", self.size)

    @property
    def reach(self) -> tuple[int, int]:
        """Only the own block."""
        return 0, 0


@dataclass(frozen=True)
class BlockWindow(BlockBand):
    """The query's own block, `left` blocks before and `right` blocks after it."""

    size: int
    left: int
    right: int

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_size("BlockWindow", self.size)
        if self.left < 0 or self.right < 0:
            raise ValueError(
                f"BlockWindow: left and right count blocks and can't be negative; got {self.left}, {self.right}"
            )

    @property
    def reach(self) -> tuple[int, int]:
        """Both sides."""
        return self.left, self.right


@dataclass(frozen=True)
class Random(Pattern):
    """Each query block sees `count` distinct key blocks, drawn uniformly.

    They are drawn from those that `exclude` doesn't make visible as a whole already; all of these, if they are fewer.
    The draw is a function of the fields and the length alone: no generator of torch's takes part.
    """

    size: int
    count: int
    seed: int
    exclude: Pattern | None = None
    table: Tensor | None = field(default=None, compare=False, repr=False)
    """bool (blocks, blocks), once resolved."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_size("Random", self.size)
        if self.count < 0 or self.seed < 0:
            raise ValueError(f"Random: count and seed can't be negative; got count={self.count}, seed={self.seed}")

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """By the table."""
        table = self._drawn().to(i.device)
        last = table.shape[0] - 1
        row, column = i // self.size, j // self.size
        return table[row.clamp(0, last), column.clamp(0, last)] & (row <= last) & (column <= last)

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """By the number of drawn blocks under the rectangle."""
        table = self._drawn().numpy()
        sums = np.zeros((table.shape[0] + 1, table.shape[1] + 1), dtype=np.int32)
        sums[1:, 1:] = table.cumsum(axis=0, dtype=np.int32).cumsum(axis=1)
        top, bottom = (np.clip(i // self.size + extra, 0, table.shape[0]) for i, extra in ((i0, 0), (i1, 1)))
        left, right = (np.clip(j // self.size + extra, 0, table.shape[1]) for j, extra in ((j0, 0), (j1, 1)))
        drawn = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        covered = (i1 // self.size - i0 // self.size + 1) * (j1 // self.size - j0 // self.size + 1)
        return np.where(drawn > 0, np.where(drawn == covered, Tile.FULL, Tile.PARTIAL), Tile.EMPTY).astype(np.int8)

    def terms(self) -> list[Term]:
        """Nothing for no blocks."""
        return [Term(filters=(self,))] if self.count else []

    def resolve(self, length: int) -> Pattern:
        """With the blocks drawn."""
        blocks = -(-length // self.size)
        legal = np.ones((blocks, blocks), dtype=bool)
        if self.exclude is not None:
            legal = ~_wholly_visible(self.exclude.resolve(length), self.size, length)
        table = torch.from_numpy(_draw(legal, self.count, self.seed))
        return Random(self.size, self.count, self.seed, self.exclude, table)

    def _drawn(self) -> Tensor:
        if self.table is None:
            raise ValueError("Random: resolve(length) must come before visible(i, j) and tiles(...)")
        return self.table

    @property
    def block(self) -> int:
        """The size."""
        return self.size


def _check_size(owner: str, size: int) -> None:
    if size < 1:
        raise ValueError(f"{owner}: size counts the tokens of a block and must be at least 1, got {size}")


def _wholly_visible(pattern: Pattern, size: int, length: int) -> NDArray[np.bool_]:
    """Which blocks of pairs a pattern makes visible as a whole, exactly: bool (blocks, blocks)."""
    first = np.arange(0, length, size)
    last = np.minimum(first + size, length) - 1
    classes = pattern.tiles(first[:, None], last[:, None], first[None], last[None])
    whole = classes == Tile.FULL
    for row, column in np.argwhere(classes == Tile.PARTIAL):
        i = torch.arange(int(first[row]), int(last[row]) + 1)[:, None]
        j = torch.arange(int(first[column]), int(last[column]) + 1)
        whole[row, column] = bool(pattern.visible(i, j).all())
    return whole


def _draw(legal: NDArray[np.bool_], count: int, seed: int) -> NDArray[np.bool_]:
    """`count` of the legal columns of each row, every choice equally likely.

    The raw stream of the bit generator is stable between versions of numpy, its derived distributions are not.
    """
    ranks = np.random.PCG64(seed).random_raw(legal.size).reshape(legal.shape)
    order = np.argsort(np.where(legal, ranks >> np.uint64(1), np.uint64(2**63)), axis=1, kind="stable")
    drawn = np.zeros_like(legal)
    np.put_along_axis(drawn, order[:, :count], True, axis=1)
    return drawn & legal
