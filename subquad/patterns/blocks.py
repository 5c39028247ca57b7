"""Patterns of whole blocks: block-diagonal, windows of blocks, random blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subquad.patterns.pattern import Pattern
from subquad.patterns.terms import Classes, Indices, Term, Tile, check_integer, classify

MOST_BLOCKS = 2**13
"""Rows and columns of the largest table of drawn blocks."""
CHUNK_PAIRS = 2**22
"""Pairs that are looked at one by one at a time."""


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
        return classify((lowest <= behind) & (highest >= -ahead), (lowest >= -ahead) & (highest <= behind))

    def offsets(self) -> tuple[int, int]:
        """The furthest pairs of the furthest blocks."""
        behind, ahead = self.reach
        return -(ahead + 1) * self.size + 1, (behind + 1) * self.size - 1

    @property
    def block(self) -> int | None:
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
        for name, blocks in (("left", self.left), ("right", self.right)):
            check_integer("BlockWindow", name, blocks, least=0, remedy="it counts blocks; 0 leaves the own block alone")

    @property
    def reach(self) -> tuple[int, int]:
        """Both sides."""
        return self.left, self.right


@dataclass(frozen=True)
class Random(Pattern):
    """Each query block sees `count` distinct key blocks, drawn uniformly.

    They are drawn from those that `exclude` doesn't make visible as a whole already; all of these, if they are fewer.
    The draw is a function of the fields and the length alone: no generator of torch's or numpy's own takes part.
    """

    size: int
    count: int
    seed: int
    exclude: Pattern | None = None
    table: Tensor | None = field(default=None, compare=False, repr=False)
    """bool (blocks, blocks), once resolved."""
    drawn_before: NDArray[np.int32] | None = field(default=None, compare=False, repr=False)
    """(blocks + 1, blocks + 1), once resolved: how many blocks are drawn in earlier rows and columns."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_size("Random", self.size)
        check_integer("Random", "count", self.count, least=0, remedy="it is how many key blocks each query block gets")
        check_integer("Random", "seed", self.seed, least=0, remedy="any such number will do")
        if self.exclude is not None and not isinstance(self.exclude, Pattern):
            raise ValueError(
                f"Random: exclude must be a pattern, got {self.exclude!r}; leave it out to exclude nothing"
            )
        if self.exclude is not None and self.exclude.num_heads:
            raise ValueError("Random: exclude must be the same for all heads; give each head a Random of its own")

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """By the table."""
        if self.table is None:
            raise ValueError("Random: resolve(length) must come before visible(i, j)")
        last = self.table.shape[0] - 1
        row, column = i // self.size, j // self.size
        return self.table[row.clamp(0, last), column.clamp(0, last)] & (row <= last) & (column <= last)

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """By the number of drawn blocks under the rectangle."""
        if self.drawn_before is None:
            raise ValueError("Random: resolve(length) must come before tiles(...)")
        blocks = len(self.drawn_before) - 1
        (top, left), (bottom, right) = (
            [np.clip(position // self.size + extra, 0, blocks) for position in corner]
            for corner, extra in (((i0, j0), 0), ((i1, j1), 1))
        )
        before = self.drawn_before
        drawn = before[bottom, right] - before[top, right] - before[bottom, left] + before[top, left]
        covered = (i1 // self.size - i0 // self.size + 1) * (j1 // self.size - j0 // self.size + 1)
        return classify(drawn > 0, drawn == covered)

    def terms(self) -> list[Term]:
        """Nothing for no blocks."""
        return [Term(filters=(self,))] if self.count else []

    def resolve(self, length: int) -> Pattern:
        """With the blocks drawn.

        Raises:
            ValueError: more blocks than a table is made for.
        """
        blocks = -(-length // self.size)
        if blocks > MOST_BLOCKS:
            raise ValueError(
                f"Random: size must cut {length} tokens into at most {MOST_BLOCKS} blocks, got {self.size}, which "
                f"makes {blocks}; take blocks of {-(-length // MOST_BLOCKS)} or more"
            )
        legal = np.ones((blocks, blocks), dtype=bool)
        if self.exclude is not None:
            legal = ~_wholly_visible(self.exclude, self.size, length)
        table = _draw(legal, self.count, self.seed)
        drawn_before = np.zeros((blocks + 1, blocks + 1), dtype=np.int32)
        drawn_before[1:, 1:] = table.cumsum(axis=0, dtype=np.int32).cumsum(axis=1)
        return replace(self, table=torch.from_numpy(table), drawn_before=drawn_before)

    def to(self, device: torch.device) -> Pattern:
        """With the table there."""
        return self if self.table is None else replace(self, table=self.table.to(device))

    @property
    def block(self) -> int | None:
        """The size."""
        return self.size


def _check_size(owner: str, size: int) -> None:
    check_integer(owner, "size", size, least=1, remedy="it counts the tokens of a block")


@lru_cache(maxsize=2)
def _wholly_visible(pattern: Pattern, size: int, length: int) -> NDArray[np.bool_]:
    """Which blocks of pairs a pattern makes visible as a whole, exactly: bool (blocks, blocks), not to be written to.

    Kept, since the heads of a layer exclude the same.
    """
    resolved = pattern.resolve(length)
    first = np.arange(0, length, size)
    last = np.minimum(first + size, length) - 1
    whole = np.zeros((len(first), len(first)), dtype=bool)
    for rows in _chunks(len(first), len(first)):
        classes = resolved.tiles(first[rows, None], last[rows, None], first[None], last[None])
        whole[rows] = classes == Tile.FULL
        row, column = np.nonzero(np.broadcast_to(classes, whole[rows].shape) == Tile.PARTIAL)
        for part in _chunks(len(row), size**2):
            i, j = _tokens(row[part] + rows.start, size, length), _tokens(column[part], size, length)
            visible = resolved.visible(i[:, :, None], j[:, None]).expand(-1, size, size)
            whole[row[part] + rows.start, column[part]] = visible.flatten(1).all(dim=1).numpy()
    whole.flags.writeable = False
    return whole


def _tokens(block: Indices, size: int, length: int) -> Tensor:
    """The tokens of blocks, int64 (N, size); places behind the end repeat the last token."""
    return (torch.from_numpy(block)[:, None] * size + torch.arange(size)).clamp(max=length - 1)


def _chunks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK_PAIRS // max(1, width))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _draw(legal: NDArray[np.bool_], count: int, seed: int) -> NDArray[np.bool_]:
    """`count` of the legal columns of each row, every choice equally likely.

    Each pair of blocks gets a random rank, and the lowest legal ones of a row are drawn. The raw stream of the bit
    generator is stable between versions of numpy, its derived distributions are not.
    """
    if count >= legal.shape[1]:
        return legal.copy()
    drawn = np.zeros_like(legal)
    source = np.random.PCG64(seed)
    for rows in _chunks(*legal.shape) if count else ():
        ranks = source.random_raw(legal[rows].size).reshape(legal[rows].shape) >> np.uint64(1)
        ranks[~legal[rows]] = np.uint64(2**63)
        np.put_along_axis(drawn[rows], np.argpartition(ranks, count - 1, axis=1)[:, :count], True, axis=1)
    return drawn & legal
