"""Counts the keys that each query sees, or says whether there are any, without writing out L x L.

What depends on the distance i - j alone is counted by running sums over the distances. The rest is counted in tiles:
those that are visible as a whole by their size, others key by key, and pair by pair where that isn't certain either.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subquad.patterns.bands import pattern_of
from subquad.patterns.blocks import CHUNK_PAIRS
from subquad.patterns.pattern import Pattern
from subquad.patterns.terms import Indices, Tile, check_integer

TILE = 256
"""Tokens of a tile's side, where the pattern doesn't suggest its own."""
FEW = 16
"""Queries that are looked at together for any visible key: mostly the first ones see some."""
CHUNK_TILES = 2**20
"""Tiles that are classified at a time."""


def keys_per_query(pattern: Pattern, length: int) -> Tensor:
    """How many of `length` keys each of as many queries sees: int64 (L,), or (H, L) for a pattern by head."""
    check_integer("keys_per_query", "length", length, least=0, remedy="it is the number of tokens")
    if not pattern.num_heads:
        return torch.from_numpy(_count(pattern, length))
    heads = [pattern.of_head(head) for head in range(pattern.num_heads)]
    counts = {head: torch.from_numpy(_count(head, length)) for head in dict.fromkeys(heads)}
    return torch.stack([counts[head] for head in heads])


def shows_anything(pattern: Pattern, queries: range, length: int) -> bool:
    """Whether any of some consecutive queries sees any of `length` keys; for resolved patterns of one head.

    Exact, unlike `Pattern.tiles`; it looks at tiles in order and stops at the first pair that is visible.
    """
    side, (low, high) = _side(pattern), pattern.offsets()
    for start in range(queries.start, queries.stop, FEW):
        rows = range(start, min(start + FEW, queries.stop))
        j0 = np.arange(max(0, rows[0] - high), min(length, rows[-1] - low + 1), side)
        j1 = np.minimum(j0 + side, length) - 1
        classes = np.broadcast_to(pattern.tiles(np.array([rows[0]]), np.array([rows[-1]]), j0, j1), j0.shape)
        if (classes == Tile.FULL).any():
            return True
        i = torch.arange(rows.start, rows.stop)[:, None]
        for place in np.flatnonzero(classes == Tile.PARTIAL):
            if bool(pattern.visible(i, torch.arange(int(j0[place]), int(j1[place]) + 1)).any()):
                return True
    return False


def _count(pattern: Pattern, length: int) -> Indices:
    resolved = pattern.resolve(length)
    if length == 0:
        return np.zeros(0, dtype=np.int64)
    terms = [pattern_of(term) for term in resolved.terms()]
    by_distance = [term for term in terms if term.by_distance]
    others = [term for term in terms if not term.by_distance]
    counts = _count_distances(reduce(Pattern.__or__, by_distance), length) if by_distance else 0
    if others:
        rest = reduce(Pattern.__and__, (~term for term in by_distance), reduce(Pattern.__or__, others))
        counts = counts + _count_tiles(rest, length)
    return counts + np.zeros(length, dtype=np.int64)


def _count_distances(pattern: Pattern, length: int) -> Indices:
    """A query at i sees the distances i - length + 1 to i."""
    distance = torch.arange(1 - length, length)
    visible = pattern.visible(distance, torch.zeros_like(distance)).numpy()
    before = np.concatenate(([0], visible.cumsum()))
    return before[length:] - before[:length]


def _count_tiles(pattern: Pattern, length: int) -> Indices:
    side = _side(pattern)
    first = np.arange(0, length, side)
    last = np.minimum(first + side, length) - 1
    counts = np.zeros((len(first), side), dtype=np.int64)
    rows = max(1, CHUNK_TILES // len(first))
    for start in range(0, len(first), rows):
        part = slice(start, start + rows)
        i0, i1, j0, j1 = first[part, None], last[part, None], first[None], last[None]
        classes = np.broadcast_to(pattern.tiles(i0, i1, j0, j1), (len(i0), len(first)))
        counts[part] += ((classes == Tile.FULL) * (j1 - j0 + 1)).sum(axis=1)[:, None]
        row, column = np.nonzero(classes == Tile.PARTIAL)
        _add_keys(pattern, counts, row + start, column, length)
    return counts.reshape(-1)[:length]


def _side(pattern: Pattern) -> int:
    """Whole blocks, so that what consists of them is certain; not so small that there are too many tiles."""
    return TILE if pattern.block is None or pattern.block > 2 * TILE else pattern.block * max(1, 64 // pattern.block)


def _add_keys(pattern: Pattern, counts: Indices, row: Indices, column: Indices, length: int) -> None:
    """Count in tiles (row, column) of which some pairs may be visible, one key at a time for all their queries."""
    side = counts.shape[1]
    inside = np.arange(side)
    for start in range(0, len(row), max(1, CHUNK_TILES // side)):
        part = slice(start, start + max(1, CHUNK_TILES // side))
        queries = row[part, None] * side
        keys = column[part, None] * side + inside
        classes = np.array(
            np.broadcast_to(pattern.tiles(queries, np.minimum(queries + side, length) - 1, keys, keys), keys.shape)
        )
        classes[keys >= length] = Tile.EMPTY
        np.add.at(counts, row[part], (classes == Tile.FULL).sum(axis=1)[:, None])
        tile, place = np.nonzero(classes == Tile.PARTIAL)
        _add_pairs(pattern, counts, row[part][tile], keys[tile, place])


def _add_pairs(pattern: Pattern, counts: Indices, row: Indices, key: Indices) -> None:
    """Count pair by pair: all queries of a row of tiles against single keys. Queries behind the end don't matter."""
    side = counts.shape[1]
    inside = torch.arange(side)
    for start in range(0, len(row), CHUNK_PAIRS // side):
        part = slice(start, start + CHUNK_PAIRS // side)
        visible = pattern.visible(
            torch.from_numpy(row[part])[:, None] * side + inside, torch.from_numpy(key[part])[:, None]
        )
        sums = _sum_by_row(visible.numpy(), row[part])
        counts[np.unique(row[part])] += sums


def _sum_by_row(visible: NDArray[np.bool_], row: Indices) -> Indices:
    """Sums over entries of equal row; rows ascend."""
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    return np.add.reduceat(visible, starts, axis=0, dtype=np.int64)
