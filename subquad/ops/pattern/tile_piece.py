"""Tiles: for each tile of queries the tiles of keys that it needs, gathered side by side.

This runs any pattern; it pays for patterns of whole blocks, whose tiles are visible altogether or not at all.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subquad.ops.fused import fused_backward, fused_forward, lse_backward
from subquad.ops.partial_softmax import CALL_BYTES, Bias, make_bias, merge, share_out, stack
from subquad.ops.pattern.piece import Gradients, Piece, Work
from subquad.ops.pattern.strip_piece import StripPiece
from subquad.ops.pattern.strips import Numbering, Shape, make_strips
from subquad.ops.pattern.tile_views import GatherBuffer, settle, sums_of, tiled
from subquad.patterns.pattern import Indices, Pattern, Tile

TILE = 64
"""Tokens of a tile where the pattern has no blocks of its own."""
CLASSES = 2**18
"""Pairs of tiles that are classified at a time."""


@dataclass(frozen=True)
class TileGroup:
    """Tiles of queries that need equally many tiles of keys.

    Attributes:
        row0: (N,), first query of each.
        rows: queries of each.
        tiles: (N, C), the tiles of keys.
        masked: whether not everything is visible.
    """

    row0: Indices
    rows: int
    tiles: Indices
    masked: bool

    @cached_property
    def row_step(self) -> int | None:
        """The distance of neighbours, where all are equally far apart."""
        if len(self.row0) < 2:
            return 0
        step = int(self.row0[1] - self.row0[0])
        return step if (np.diff(self.row0) == step).all() else None


@dataclass(frozen=True)
class TilePiece(Piece):
    """Part of a pattern in tiles.

    Attributes:
        size: tokens of a tile of keys; the last tile may stick out over the end.
        groups: what is computed; no query stands in two of them.
        predicate: what is visible inside masked groups, in absolute positions.
    """

    size: int
    groups: tuple[TileGroup, ...]
    predicate: Pattern

    @property
    def empty(self) -> bool:
        """Whether nothing is left to compute."""
        return not self.groups

    def price(self, shape: Shape) -> float:
        """What it costs for one head, in pairs of dense attention; gathering costs something too."""
        pairs = sum(group.rows * group.tiles.size * self.size * (1.3 if group.masked else 1.0) for group in self.groups)
        return pairs * (1.25 + 32 / self.size) + shape.call_pairs * len(self.groups)

    @property
    def signature(self) -> Hashable:
        """None: tiles are where heads differ."""
        return None

    def covered(self, length: int) -> NDArray[np.bool_]:
        """The rows of all groups."""
        covered = np.zeros(length, dtype=bool)
        for group in self.groups:
            covered[group.row0[:, None] + np.arange(group.rows)] = True
        return covered

    def forward(self, work: Work) -> None:
        """One call for each cut of a group."""
        keys, values = tiled(work.k, self.size), tiled(work.v, self.size)
        buffers = GatherBuffer(keys), GatherBuffer(values)
        for group, bias, part in self._cuts(work):
            k, v = buffers[0].gather(keys[part], group.tiles), buffers[1].gather(values[part], group.tiles)
            q, out, lse = (_take_rows(x[part], group) for x in (work.q, work.out, work.lse))
            part_out, part_lse = fused_forward(q, k, v, work.scale, None if bias is None else bias.values)
            if bias is not None and bias.hidden_rows is not None:
                part_lse = part_lse.masked_fill(bias.hidden_rows, -torch.inf)
            merge(out, lse, part_out, part_lse, fresh=work.fresh)
            _put_rows(work.out[part], group, out)
            _put_rows(work.lse[part], group, lse)

    def backward(self, work: Work, gradients: Gradients) -> None:
        """As `forward`; keys are gathered and masks made again."""
        keys, values = tiled(work.k, self.size), tiled(work.v, self.size)
        buffers = GatherBuffer(keys), GatherBuffer(values)
        grad_keys, grad_values = sums_of(gradients.k, self.size), sums_of(gradients.v, self.size)
        for group, bias, part in self._cuts(work):
            k, v = buffers[0].gather(keys[part], group.tiles), buffers[1].gather(values[part], group.tiles)
            mask = None if bias is None else bias.values
            q, out, lse, grad = (_take_rows(x[part], group) for x in (work.q, work.out, work.lse, gradients.out))
            grad_q, grad_k, grad_v = fused_backward(grad, q, k, v, out, lse, work.scale, mask)
            if gradients.lse is not None:
                grad_lse = _take_rows(gradients.lse[part], group)
                more_q, more_k = lse_backward(grad_lse, q, k, lse, work.scale, mask)
                grad_q, grad_k = grad_q + more_q, grad_k + more_k
            _add_rows(gradients.q[part], group, grad_q, fresh=work.fresh)
            _scatter(grad_keys[part], group, grad_k)
            _scatter(grad_values[part], group, grad_v)
        settle(gradients.k, grad_keys)
        settle(gradients.v, grad_values)

    def _cuts(self, work: Work) -> Iterator[tuple[TileGroup, Bias | None, slice]]:
        """Groups cut so that a call's temporaries stay in the cache, each with its mask, for ranges of heads."""
        for group in self.groups:
            for some, restricted in self._restricted(group, work):
                width = some.tiles.shape[1] * self.size
                elements = (some.rows + 2 * width) * work.q.shape[-1] + (some.rows * width if some.masked else 0)
                size = max(1, CALL_BYTES // (elements * work.q.element_size()))
                for chosen in share_out(len(some.row0), size):
                    cut = replace(some, row0=some.row0[chosen], tiles=some.tiles[chosen])
                    bias = self._bias(cut, work, restricted=restricted) if some.masked or restricted else None
                    for heads in share_out(len(work.q), size // len(cut.row0)):
                        yield cut, bias, heads

    def _restricted(self, group: TileGroup, work: Work) -> Iterator[tuple[TileGroup, bool]]:
        """The part of a group that facts about the example leave alone, and the part that they restrict."""
        if not work.facts.anything:
            yield group, False
            return
        key0 = group.tiles * self.size
        key1 = np.minimum(key0 + self.size, work.k.shape[1]) - 1
        kept, whole = work.facts.classify(group.row0[:, None], (group.row0 + group.rows - 1)[:, None], key0, key1)
        for restricted in (False, True):
            chosen = kept.any(axis=1) & (whole.all(axis=1) != restricted)
            if chosen.any():
                yield replace(group, row0=group.row0[chosen], tiles=group.tiles[chosen]), restricted

    def _bias(self, group: TileGroup, work: Work, *, restricted: bool) -> Bias:
        query = _rows(group).view(-1, 1, group.rows, 1)
        key = torch.from_numpy(group.tiles)[..., None] * self.size + torch.arange(self.size)
        key = key.reshape(len(group.row0), 1, 1, -1)
        inside = key < work.k.shape[1]
        key = key.clamp(max=work.k.shape[1] - 1)
        visible = self.predicate.visible(query + work.offset, key) & inside
        allowed = work.facts.visible(query, key) if restricted else None
        visible = visible if allowed is None else visible & allowed
        return make_bias(visible, work.q.dtype).to(work.q.device, work.q.dtype)


def compile_tiles(pattern: Pattern, shape: Shape) -> list[Piece]:
    """The tiles of a pattern; queries that need most keys stand in strips instead, for which nothing is gathered."""
    size = _tile_size(pattern)
    starts = np.arange(-(shape.offset % size), shape.queries, size)
    row0, row1 = np.maximum(starts, 0), np.minimum(starts + size, shape.queries)
    needed = _needed(pattern, row0 + shape.offset, row1 + shape.offset, shape.keys, size)
    zeros = np.zeros_like(row0[needed.crowded])
    strips = make_strips(
        row0[needed.crowded], row1[needed.crowded], zeros, zeros + shape.keys, masked=needed.masked[needed.crowded]
    )
    in_strips = StripPiece(Numbering(shape.queries, shape.keys), strips, pattern, invariant=False)
    pieces: list[Piece] = [in_strips, TilePiece(size, _groups(row0, row1, needed), pattern)]
    return [piece for piece in pieces if not piece.empty]


def _tile_size(pattern: Pattern) -> int:
    """The pattern's blocks, or as many or as few of them as make a tile of sensible size."""
    size = pattern.block or TILE
    while size < TILE // 2:
        size *= 2
    while size > 2 * TILE and size % 2 == 0:
        size //= 2
    return size


class _Needed(NamedTuple):
    """The tiles of keys that tiles of queries need.

    Attributes:
        counts: int (N,), how many; 0 for a crowded one.
        tiles: those of all, one after the other.
        masked: bool (N,), whether not everything in them is visible.
        crowded: bool (N,), those that need more than half of all, which aren't listed.
    """

    counts: Indices
    tiles: Indices
    masked: NDArray[np.bool_]
    crowded: NDArray[np.bool_]


def _needed(pattern: Pattern, i0: Indices, i1: Indices, keys: int, size: int) -> _Needed:
    """What queries i0 to i1, ends left out, need of `keys` keys, in memory linear in both."""
    j0 = np.arange(0, keys, size)
    j1 = np.minimum(j0 + size, keys) - 1
    step = max(1, CLASSES // max(1, len(j0)))
    found = []
    for start in range(0, len(i0), step):
        rows = slice(start, start + step)
        classes = np.broadcast_to(pattern.tiles(i0[rows, None], i1[rows, None] - 1, j0, j1), (len(i0[rows]), len(j0)))
        seen = classes != Tile.EMPTY
        crowded = seen.sum(axis=1) > len(j0) // 2
        masked = np.where(crowded, (classes != Tile.FULL).any(axis=1), (classes == Tile.PARTIAL).any(axis=1))
        if keys % size:
            masked |= seen[:, -1] & ~crowded
        seen = seen & ~crowded[:, None]
        found.append(_Needed(seen.sum(axis=1), np.nonzero(seen)[1], masked, crowded))
    return _Needed(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))


def _groups(row0: Indices, row1: Indices, needed: _Needed) -> tuple[TileGroup, ...]:
    first = np.cumsum(needed.counts) - needed.counts
    kinds = np.stack((row1 - row0, needed.counts, needed.masked), axis=1)
    found = []
    for rows, count, is_masked in np.unique(kinds[needed.counts > 0], axis=0).tolist():
        chosen = np.flatnonzero((kinds == (rows, count, is_masked)).all(axis=1))
        tiles = needed.tiles[first[chosen, None] + np.arange(count)]
        found.append(TileGroup(row0[chosen], rows, tiles, bool(is_masked)))
    return tuple(found)


def _rows(group: TileGroup) -> Tensor:
    """Index of all queries of a group, int64 (N * rows,)."""
    return (torch.from_numpy(group.row0)[:, None] + torch.arange(group.rows)).flatten()


def _take_rows(x: Tensor, group: TileGroup) -> Tensor:
    """(G, L, ...) -> (N, G, rows, ...): a view where the group's tiles are evenly spaced, else a copy."""
    if group.row_step is not None:
        return stack(x, int(group.row0[0]), group.rows, len(group.row0), group.row_step)
    return x.index_select(1, _rows(group).to(x.device)).unflatten(1, (-1, group.rows)).transpose(0, 1)


def _put_rows(x: Tensor, group: TileGroup, taken: Tensor) -> None:
    """Write back what `_take_rows` copied."""
    if group.row_step is None:
        x.index_copy_(1, _rows(group).to(x.device), taken.transpose(0, 1).flatten(1, 2))


def _add_rows(x: Tensor, group: TileGroup, part: Tensor, *, fresh: bool) -> None:
    """Add (N, G, rows, E) to the rows (G, L, E) of a group; write it, if these are fresh."""
    rows = _take_rows(x, group)
    rows.copy_(part) if fresh else rows.add_(part)
    _put_rows(x, group, rows)


def _scatter(tiles: Tensor, group: TileGroup, gathered: Tensor) -> None:
    """Add (N, G, C * size, E) to the tiles (G, tiles, size, E) that it was gathered from."""
    index = torch.from_numpy(group.tiles.ravel()).to(tiles.device)
    for sequence, of_sequence in enumerate(tiles):
        of_sequence.index_add_(0, index, gathered[:, sequence].reshape(-1, *of_sequence.shape[1:]))
