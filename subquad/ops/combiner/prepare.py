"""Preparing the examples of a batch: the plan laid out for the length of each, with masks for what is not real."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.combiner.layout import Example
from subquad.ops.combiner.plans import Plan
from subquad.ops.combiner.summarize import Options
from subquad.ops.precision import wide_dtype
from subquad.ops.rectangles import SUMMARIES, TOKENS


def prepare_examples(
    q: Tensor, plan: Plan, causal: bool, valid: Tensor | None, options: Options
) -> list[Example | None]:
    """The examples of a batch; None for one without real tokens."""
    wide, length = wide_dtype(q), q.shape[2]
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
    return Example(length, padded, layout, kept if hiding else None, sizes, gaps)
