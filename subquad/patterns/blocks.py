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
"""Blocks that a sequence has at most where some are drawn: each draw looks at every pair of them."""
CHUNK_PAIRS = 2**20
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
    drawn: Tensor | None = field(default=None, compare=False, repr=False)
    """int64 (blocks, at most count), once resolved: those of each query block in order, filled up with `blocks`."""

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
        """By what is drawn for the query's block."""
        if self.drawn is None:
            raise ValueError("Random: resolve(length) must come before visible(i, j)")
        blocks, most = self.drawn.shape
        row, column = i // self.size, j // self.size
        own, found = row.clamp(max=blocks - 1), torch.zeros_like(row == column)
        for place in range(most):
            found = found | (self.drawn[own, place] == column)
        return found & (row < blocks) & (column < blocks)

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """By the number of drawn blocks under the rectangle, one row of blocks after the other."""
        if self.drawn is None:
            raise ValueError("Random: resolve(length) must come before tiles(...)")
        blocks = len(self.drawn)
        top, bottom, left, right = (position // self.size for position in (i0, i1, j0, j1))
        places = (torch.arange(blocks)[:, None] * (blocks + 1) + self.drawn.cpu()).flatten().numpy()
        found = np.zeros(np.broadcast_shapes(i0.shape, i1.shape, j0.shape, j1.shape), dtype=np.int64)
        for step in range(int((bottom - top).max(initial=-1)) + 1):
            row = top + step
            first = np.minimum(row, blocks) * (blocks + 1)
            within = np.searchsorted(places, first + np.minimum(right, blocks - 1), side="right")
            found += (row <= bottom) * (within - np.searchsorted(places, first + np.minimum(left, blocks)))
        covered = (bottom - top + 1) * (right - left + 1)
        return classify(found > 0, found == covered)

    def terms(self) -> list[Term]:
        """Nothing for no blocks."""
        return [Term(filters=(self,))] if self.count else []

    def resolve(self, length: int) -> Pattern:
        """With the blocks drawn.

        Raises:
            ValueError: more blocks than can be drawn among.
        """
        blocks = -(-length // self.size)
        if blocks > MOST_BLOCKS:
            raise ValueError(
                f"Random: size must cut {length} tokens into at most {MOST_BLOCKS} blocks, got {self.size}, which "
                f"makes {blocks}; take blocks of {-(-length // MOST_BLOCKS)} or more"
            )
        excluded = None if self.exclude is None else _wholly_visible(self.exclude, self.size, length)
        return replace(self, drawn=torch.from_numpy(_draw(excluded, blocks, self.count, self.seed)))

    def to(self, device: torch.device) -> Pattern:
        """With what is drawn there."""
        return self if self.drawn is None else replace(self, drawn=self.drawn.to(device))

    @property
    def block(self) -> int | None:
        """The size."""
        return self.size


def _check_size(owner: str, size: int) -> None:
    check_integer(owner, "size", size, least=1, remedy="it counts the tokens of a block")


@lru_cache(maxsize=2)
def _wholly_visible(pattern: Pattern, size: int, length: int) -> NDArray[np.uint8]:
    """Which blocks of pairs a pattern makes visible as a whole, exactly: (blocks, blocks / 8), a bit for each.

    Kept, since the heads of a layer exclude the same; not to be written to.
    """
    resolved = pattern.resolve(length)
    first = np.arange(0, length, size)
    last = np.minimum(first + size, length) - 1
    packed = np.zeros((len(first), -(-len(first) // 8)), dtype=np.uint8)
    for rows in _chunks(len(first), len(first)):
        classes = resolved.tiles(first[rows, None], last[rows, None], first[None], last[None])
        classes = np.broadcast_to(classes, (rows.stop - rows.start, len(first)))
        whole = classes == Tile.FULL
        row, column = np.nonzero(classes == Tile.PARTIAL)
        for part in _chunks(len(row), size**2):
            i, j = _tokens(row[part] + rows.start, size, length), _tokens(column[part], size, length)
            visible = resolved.visible(i[:, :, None], j[:, None]).expand(-1, size, size)
            whole[row[part], column[part]] = visible.flatten(1).all(dim=1).numpy()
        packed[rows] = np.packbits(whole, axis=1)
    packed.flags.writeable = False
    return packed


def _tokens(block: Indices, size: int, length: int) -> Tensor:
    """The tokens of blocks, int64 (N, size); places behind the end repeat the last token."""
    return (torch.from_numpy(block)[:, None] * size + torch.arange(size)).clamp(max=length - 1)


def _chunks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK_PAIRS // max(1, width))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _draw(excluded: NDArray[np.uint8] | None, blocks: int, count: int, seed: int) -> NDArray[np.int64]:
    """`count` of the columns of each row that aren't excluded, every choice equally likely; result as `Random.drawn`.

    Each pair of blocks gets a random rank, and the lowest legal ones of a row are drawn. The raw stream of the bit
    generator is stable between versions of numpy, its derived distributions are not.
    """
    drawn = np.full((blocks, min(count, blocks)), blocks, dtype=np.int64)
    source = np.random.PCG64(seed)
    for rows in _chunks(blocks, blocks) if count else ():
        legal = np.ones((rows.stop - rows.start, blocks), dtype=bool)
        if excluded is not None:
            legal = np.unpackbits(excluded[rows], axis=1, count=blocks) == 0
        if count < blocks:
            ranks = source.random_raw(legal.size).reshape(legal.shape) >> np.uint64(1)
            ranks[~legal] = np.uint64(2**63)
            lowest = np.zeros_like(legal)
            np.put_along_axis(lowest, np.argpartition(ranks, count - 1, axis=1)[:, :count], True, axis=1)
            legal &= lowest
        row, column = np.nonzero(legal)
        begins = np.searchsorted(row, np.arange(len(legal)))
        drawn[row + rows.start, np.arange(len(row)) - begins[row]] = column
    return drawn
