"""A plan laid out for a length, and for one example of a batch, with masks for what is not real."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from subquad.ops.combiner.blocks import Blocks
from subquad.ops.combiner.region_pooling import SUM, Pool
from subquad.ops.rectangles import SUMMARIES, TOKENS, Gather, Keys, Part, View


class Layout(NamedTuple):
    """A plan for a length, which is a multiple of its unit.

    Attributes:
        regions: R, different regions.
        pool: queries or keys of tokens to those of regions; to nothing where single tokens ask.
        sizes: how many of the tokens that are marked 1 (1, L, 1) are in each region, (R,).
        summaries: parts with regions for rows and tokens for keys.
        parts: parts with tokens for rows, whose results are merged; the first has all of them. None at all with blocks.
        blocks: what attends in place of parts; None for nothing.
    """

    regions: int
    pool: Pool
    sizes: Callable[[Tensor], Tensor]
    summaries: list[Part]
    parts: list[Part]
    blocks: Blocks | None = None


class Example(NamedTuple):
    """What one example runs.

    Attributes:
        length: tokens up to the last real one.
        padded: the multiple of the plan's unit to which they are filled up.
        layout: of that length, its parts with the masks of this example.
        kept: bool (padded,), the real ones where others may be seen; None where none can be.
        sizes: (R,), real tokens in each region, where that matters.
        gaps: whether tokens before the last real one are not real.
    """

    length: int
    padded: int
    layout: Layout
    kept: Tensor | None
    sizes: Tensor | None
    gaps: bool


def tokens(view: View) -> Keys:
    """Token columns."""
    return Keys(TOKENS, view)


def summaries(rows: View | Gather) -> Keys:
    """Summary columns."""
    return Keys(SUMMARIES, rows)


def sizes_by(pool: Pool) -> Callable[[Tensor], Tensor]:
    """Sizes where a region is what is pooled."""
    return lambda kept: pool(kept, SUM)[0, :, 0]
