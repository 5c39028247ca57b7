"""Compiles a pattern into disjoint pieces that the fused operator can run.

The pattern is taken apart into conjunctions (`Pattern.terms`). Each becomes strips in the numbering that suits it:

    bounded distance             bands of consecutive keys, one numbering for each residue where distances are multiples
    blocks                       strips of whole blocks
    chosen keys, chosen queries  strips over the list of these alone
    anything else                tiles of keys gathered for each tile of queries

A conjunction leaves out what earlier ones have covered. Patterns of whole blocks run in tiles altogether where that
computes less. Where nothing computes less than dense attention, the pattern runs in slices of queries against the keys
that they may reach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from subquad.ops.pattern.band_strips import SLICE_PAIRS, band_strips, lanes_of
from subquad.ops.pattern.piece import Piece
from subquad.ops.pattern.row_slices import row_slices, slices_price
from subquad.ops.pattern.strip_piece import StripPiece
from subquad.ops.pattern.strips import Numbering, Shape, Strips, make_strips
from subquad.ops.pattern.tile_piece import compile_tiles
from subquad.patterns.bands import pattern_of
from subquad.patterns.counting import shows_anything
from subquad.patterns.pattern import And, Classes, Indices, Not, Or, Pattern, Term, Tile

Maker = Callable[[Term, Shape, bool], list[Piece]]

SLICE_ROWS = 128
"""Queries per strip where nothing suggests another size."""
STAIR_ROWS = 1024
"""Rows of strips that are joined although they reach differently far: from 768 on the operator takes 256 at a time."""
PIECE_PAIRS = 40
"""What one more piece costs each query, in pairs of dense attention."""
COLUMN_CHUNKS = 512
"""Into how many ranges a list of keys is cut to find those that a strip needs."""


@dataclass(frozen=True)
class HeadPlan:
    """Disjoint pieces for one head, and whether they are dense attention in slices."""

    pieces: tuple[Piece, ...]
    dense: bool


def compile_pattern(pattern: Pattern, shape: Shape, *, sliced: bool) -> HeadPlan:
    """The plan that costs least, without pieces where no query sees a key; to prepare pieces costs as much as a call.

    Args:
        pattern: resolved, of one head.
        shape: of the problem.
        sliced: whether masks may be added when it runs, so that strips must stay small.
    """
    queries = range(shape.offset, shape.offset + shape.queries)
    if shape.queries == shape.keys and not shows_anything(pattern, queries, shape.keys):
        return HeadPlan((), dense=False)  # to be told of; tiles that may show something would hide it
    slices = _in_slices(pattern, shape)
    plans = [slices, _by_terms(pattern, shape, sliced=sliced)]
    if pattern.block is not None:
        plans.append(compile_tiles(pattern, shape))
    prices = [sum(slices_price(piece.strips, shape) for piece in slices)]
    prices += [_price(pieces, shape) + shape.call_pairs for pieces in plans[1:]]
    best = int(np.argmin(prices))
    return HeadPlan(tuple(plans[best]), dense=best == 0)


def _price(pieces: list[Piece], shape: Shape) -> float:
    return sum(piece.price(shape) for piece in pieces) + PIECE_PAIRS * shape.queries * max(0, len(pieces) - 1)


def _in_slices(pattern: Pattern, shape: Shape) -> list[StripPiece]:
    """Dense attention in slices of queries, cut to the keys that they may reach."""
    low, high = pattern.offsets()
    strips = row_slices(shape, low, high, max(1, SLICE_PAIRS // shape.keys))
    piece = StripPiece(Numbering(shape.queries, shape.keys), strips, pattern, invariant=False)
    seen = piece.without_hidden(pattern, shape.offset)
    return [] if seen.empty else [seen]


def _by_terms(pattern: Pattern, shape: Shape, *, sliced: bool) -> list[Piece]:
    """One piece or more for each conjunction; those that no numbering suits share tiles."""
    pieces: list[Piece] = []
    done: list[Term] = []
    homeless: list[Pattern] = []
    reachable = Term(shape.offset - shape.keys + 1, shape.offset + shape.queries - 1)
    terms = [term for whole in pattern.terms() if not (term := whole.meet(reachable)).empty]
    for term in sorted(terms, key=lambda term: _rank(term, shape)):
        for part in reduce(_without, done, [term]):
            maker = _choose_maker(part, shape)
            if maker is None:
                homeless.append(pattern_of(part))
            else:
                pieces += maker(part, shape, sliced)
        done.append(term)
    if homeless:
        pieces += compile_tiles(Or(tuple(homeless)), shape)
    return [piece for piece in pieces if not piece.empty]


def _rank(term: Term, shape: Shape) -> tuple[int, int, int]:
    """Bands first, wide before narrow, then blocks, lists of keys, tiles, lists of queries.

    What comes first runs without a mask for what comes later, and bands are the most pairs.
    """
    makers = [_band_pieces, _block_pieces, _key_pieces, None, _query_pieces]
    return makers.index(_choose_maker(term, shape)), term.modulus, term.low - term.high


def _without(parts: list[Term], earlier: Term) -> list[Term]:
    return [rest for part in parts for rest in _subtract(part, earlier)]


def _subtract(part: Term, earlier: Term) -> list[Term]:
    """The part without what an earlier term covers.

    By its bounds, where the earlier term covers everything of the part between its own bounds; else by a filter.
    """
    if part.meet(earlier).empty:
        return [part]
    if part.modulus % earlier.modulus == 0 and set(earlier.filters) <= set(part.filters):
        before = part._replace(high=min(part.high, earlier.low - 1))
        after = part._replace(low=max(part.low, earlier.high + 1))
        return [side for side in (before, after) if not side.empty]
    if earlier.low <= part.low and part.high <= earlier.high and part.modulus % earlier.modulus == 0:
        earlier = Term(filters=earlier.filters)  # its distances hold anyway: without them tiles are classified sharper
    return [part._replace(filters=(*part.filters, Not(pattern_of(earlier))))]


def _choose_maker(term: Term, shape: Shape) -> Maker | None:
    """What computes least for a term; None where tiles are to be gathered."""
    band = shape.queries * min((term.high - term.low) // term.modulus + 1, shape.keys)
    prices: dict[Maker, int] = {_band_pieces: band}
    for part in term.filters:
        keys, queries = part.chosen_keys(shape.keys), part.chosen_queries(shape.queries + shape.offset)
        if keys is not None:
            prices[_key_pieces] = shape.queries * len(keys)
        elif queries is not None:
            prices[_query_pieces] = len(queries) * shape.keys
        elif part.reach is not None and part.block is not None:
            prices[_block_pieces] = shape.queries * part.block * (1 + sum(part.reach))
    best = min(prices, key=lambda maker: prices[maker])
    wide = prices[best] > shape.queries * shape.keys // 4
    return None if wide and any(part.chosen_keys(shape.keys) is None for part in term.filters) else best


def _band_pieces(term: Term, shape: Shape, sliced: bool) -> list[Piece]:
    """Consecutive keys, in lanes of equal residue."""
    predicate = pattern_of(term)
    pieces: list[Piece] = []
    for numbering in lanes_of(shape, term.modulus):
        strips = band_strips(numbering, term.low, term.high, shape.offset, sliced=sliced or bool(term.filters))
        alone = not term.filters
        piece = StripPiece(numbering, strips, predicate, invariant=alone, joinable=alone)
        pieces.append(piece.without_hidden(And(term.filters), shape.offset) if term.filters else piece)
    return pieces


def _block_pieces(term: Term, shape: Shape, sliced: bool) -> list[Piece]:
    """Strips of whole blocks of queries."""
    blocks = next(part for part in term.filters if part.reach is not None)
    assert blocks.block is not None
    assert blocks.reach is not None
    size, (behind, ahead) = blocks.block, blocks.reach
    block = np.arange(shape.offset // size, (shape.offset + shape.queries - 1) // size + 1)
    row0 = np.clip(block * size - shape.offset, 0, shape.queries)
    row1 = np.clip((block + 1) * size - shape.offset, 0, shape.queries)
    column0 = np.maximum((block - behind) * size, row0 + shape.offset - term.high)
    column1 = np.minimum((block + ahead + 1) * size, row1 + shape.offset - term.low)
    strips = make_strips(row0, row1, np.clip(column0, 0, shape.keys), np.clip(column1, 0, shape.keys))
    others = tuple(part for part in term.filters if part is not blocks)
    if not others:
        strips = replace(strips, causal=_triangles(strips, shape, term, sliced=sliced))
    rest = pattern_of(term._replace(filters=others))
    piece = StripPiece(Numbering(shape.queries, shape.keys), strips, rest, invariant=not others)
    return [piece.without_hidden(rest, shape.offset)]


def _triangles(strips: Strips, shape: Shape, term: Term, *, sliced: bool) -> NDArray[np.bool_]:
    """Which strips are squares on the diagonal of which the past is visible."""
    rows, columns = strips.row1 - strips.row0, strips.column1 - strips.column0
    on_diagonal = (strips.row0 + shape.offset == strips.column0) & (rows == columns)
    small = (rows <= SLICE_ROWS) | (not sliced)
    return on_diagonal & small & (term.low == 0) & (term.high >= rows - 1) & (term.modulus == 1)


def _key_pieces(term: Term, shape: Shape, sliced: bool) -> list[Piece]:
    """Strips over a list of keys."""
    lists = [keys for part in term.filters if (keys := part.chosen_keys(shape.keys)) is not None]
    keys = reduce(np.intersect1d, lists)
    others = tuple(part for part in term.filters if part.chosen_keys(shape.keys) is None)
    rest = pattern_of(term._replace(filters=others))
    numbering = Numbering(shape.queries, len(keys), keys=keys)
    size = rest.block if rest.block is not None and 32 <= rest.block <= 512 else SLICE_ROWS
    size = max(1, min(size, SLICE_PAIRS // max(1, len(keys))))
    starts = np.arange(-(shape.offset % size), shape.queries, size)
    row0, row1 = np.maximum(starts, 0), np.minimum(starts + size, shape.queries)
    return _listed(numbering, row0, row1, rest, shape.offset)


def _query_pieces(term: Term, shape: Shape, sliced: bool) -> list[Piece]:
    """Strips of a list of queries."""
    end = shape.offset + shape.queries
    lists = [queries for part in term.filters if (queries := part.chosen_queries(end)) is not None]
    queries = reduce(np.intersect1d, lists) - shape.offset
    queries = queries[(queries >= 0) & (queries < shape.queries)]
    others = tuple(part for part in term.filters if part.chosen_queries(end) is None)
    rest = pattern_of(term._replace(filters=others))
    numbering = Numbering(len(queries), shape.keys, queries=queries)
    size = max(1, min(SLICE_ROWS, SLICE_PAIRS // shape.keys))
    row0 = np.arange(0, len(queries), size)
    return _listed(numbering, row0, np.minimum(row0 + size, len(queries)), rest, shape.offset)


def _listed(numbering: Numbering, row0: Indices, row1: Indices, rest: Pattern, offset: int) -> list[Piece]:
    """Strips of given rows against the columns that they need, found by classifying ranges of columns."""
    if not len(row0) or not numbering.columns:
        return []
    chunk = -(-numbering.columns // COLUMN_CHUNKS)
    column0 = np.arange(0, numbering.columns, chunk)
    column1 = np.minimum(column0 + chunk, numbering.columns)
    i0, i1 = numbering.query(row0) + offset, numbering.query(row1 - 1) + offset
    j0, j1 = numbering.key(column0), numbering.key(column1 - 1)
    classes = np.broadcast_to(rest.tiles(i0[:, None], i1[:, None], j0, j1), (len(row0), len(column0)))
    needed = classes != Tile.EMPTY
    kept = needed.any(axis=1)
    first, last = needed.argmax(axis=1), len(column0) - 1 - needed[:, ::-1].argmax(axis=1)
    masked = _full_until(classes, last) - _full_until(classes, first - 1) < last - first + 1
    strips = make_strips(row0[kept], row1[kept], column0[first[kept]], column1[last[kept]], masked=masked[kept])
    strips, corner = _join_stairs(_join_equal(strips))
    return [StripPiece(numbering, strips, rest, invariant=False, corner=corner)]


def _full_until(classes: Classes, last: Indices) -> Indices:
    """How many of the columns 0..last of each row are FULL."""
    counts = np.pad((classes == Tile.FULL).cumsum(axis=1), ((0, 0), (1, 0)))
    return np.take_along_axis(counts, last[:, None] + 1, axis=1)[:, 0]


def _join_equal(strips: Strips) -> Strips:
    """Neighbours without mask over the same columns as one strip."""
    if len(strips.row0) < 2:
        return strips
    same = (strips.column0[1:] == strips.column0[:-1]) & (strips.column1[1:] == strips.column1[:-1])
    same &= ~strips.masked[1:] & ~strips.masked[:-1] & (strips.row0[1:] == strips.row1[:-1])
    opens, closes = np.append(True, ~same), np.append(~same, True)
    return replace(strips[opens], row1=strips.row1[closes])


def _join_stairs(strips: Strips) -> tuple[Strips, NDArray[np.bool_] | None]:
    """Neighbours without mask that reach ever further, some at a time as one strip with a mask.

    Tall strips run faster, by more than their hidden corner costs; what all of them see needs no mask. Also returns
    what is visible in the corner, where it is the same in all strips.
    """
    rows = strips.row1 - strips.row0
    stairs = not strips.masked.any() and (np.diff(strips.column0) == 0).all() and (np.diff(strips.column1) > 0).all()
    together = STAIR_ROWS // int(rows.max(initial=1))
    if len(rows) < 2 or not stairs or together < 2 or (strips.row0[1:] != strips.row1[:-1]).any():
        return strips, None
    first = np.arange(0, len(rows), together)
    last = np.minimum(first + together, len(rows)) - 1
    joined = replace(strips[last], row0=strips.row0[first])
    masked = joined.row1 - joined.row0 > rows[last]
    corner = _common_corner(rows, strips.column1, together)
    return replace(joined, masked=masked, clear=strips.column1[first] - strips.column0[first]), corner


def _common_corner(rows: Indices, column1: Indices, together: int) -> NDArray[np.bool_] | None:
    """What rows of every `together` strips see of the columns that not all of these see; None where it varies."""
    reach = column1 - column1[np.arange(len(rows)) // together * together]
    if (rows[:-1] != rows[0]).any() or (reach != np.resize(reach[:together], len(rows))).any():
        return None
    return np.arange(reach.max()) < np.repeat(reach[:together], rows[0])[:, None]
