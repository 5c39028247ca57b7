"""What one example of a batch runs: a plan laid out for its length, with masks for what is not real."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.combiner.plans import Layout, Plan
from subquad.ops.rectangles import SUMMARIES, TOKENS


class Options(NamedTuple):
    """How regions are summarised, but for the weights.

    Attributes:
        reduce: "max", "mean" or "sum".
        rectified: whether negative features count as 0.
        log_size: whether a region's score grows by the logarithm of its size.
    """

    reduce: str
    rectified: bool
    log_size: bool


class Example(NamedTuple):
    """What one example runs.

    Attributes:
        length: tokens up to the last real one.
        padded: the multiple of the plan's unit to which they are filled up.
        layout: of that length, its parts with the masks of this example.
        plan: the plan.
        kept: bool (padded,), the real ones where others may be seen; None where none can be.
        sizes: (R,), real tokens in each region, where that matters.
        gaps: whether tokens before the last real one are not real.
    """

    length: int
    padded: int
    layout: Layout
    plan: Plan
    kept: Tensor | None
    sizes: Tensor | None
    gaps: bool


def prepare_examples(
    q: Tensor, plan: Plan, causal: bool, valid: Tensor | None, options: Options
) -> list[Example | None]:
    """The examples of a batch; None for one without real tokens."""
    wide, length = torch.promote_types(q.dtype, torch.float32), q.shape[2]
    with torch.device(q.device):
        if valid is None:
            return [_whole_example(plan, length, causal, options, wide, q.device)] * q.shape[0]
        examples: list[Example | None] = []
        for row in valid:
            count = int(row.sum())
            last = int(row.nonzero()[-1]) + 1 if count else 0
            if count == 0:
                examples.append(None)
            elif count == last:
                examples.append(_whole_example(plan, last, causal, options, wide, q.device))
            else:
                examples.append(_prepare(plan, row[:last], causal, options, wide))
        return examples


@lru_cache(maxsize=64)
def _whole_example(
    plan: Plan, length: int, causal: bool, options: Options, dtype: torch.dtype, device: torch.device
) -> Example:
    """All tokens are real. A pure function, remembered because layers ask again with the same arguments."""
    return _prepare(plan, torch.ones(length, dtype=torch.bool, device=device), causal, options, dtype)


def _prepare(plan: Plan, kept: Tensor, causal: bool, options: Options, dtype: torch.dtype) -> Example:
    length, gaps = len(kept), not bool(kept.all())
    padded = length + -length % plan.unit(length)
    layout = plan.layout(padded, causal=causal)
    hiding = gaps or (padded > length and not causal)
    kept = F.pad(kept, (0, padded - length))
    sizes = None
    added: dict[str, Tensor] = {}
    if hiding or options.log_size or options.reduce == "mean":
        counted = kept if hiding else torch.ones_like(kept)
        sizes = layout.sizes(counted.to(dtype)[None, :, None])
        if options.log_size:
            added[SUMMARIES] = sizes.log()
        elif bool((sizes == 0).any()):
            added[SUMMARIES] = torch.zeros_like(sizes).masked_fill_(sizes == 0, -torch.inf)
    if hiding:
        added[TOKENS] = torch.zeros(padded, dtype=dtype).masked_fill_(~kept, -torch.inf)
    layout = layout._replace(
        summaries=[part.restrict(added, dtype) for part in layout.summaries],
        parts=[part.restrict(added, dtype) for part in layout.parts],
        blocks=None if layout.blocks is None else layout.blocks.restrict(added, dtype),
    )
    return Example(length, padded, layout, plan, kept if hiding else None, sizes, gaps)
