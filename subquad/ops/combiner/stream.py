"""Combiner token by token: what is kept of a stream, summaries of the regions that become whole, and attention to both.

Queries find what they see by index, some at a time, so that a token costs what its plan says. The definition is
`combiner_attention_by_regions`; a stream from its beginning equals it, however it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.ops.combiner.stream_regions import NO_REGION, StreamPlan, StreamRegions
from subquad.ops.packing import take
from subquad.ops.precision import full_precision

LARGEST_SLICE = 2**20
"""Numbers of keys that are looked up together, over all examples and heads."""


class Kept(NamedTuple):
    """The tokens of a stream that are at hand, for each example those from `first` on.

    Attributes:
        first: int64 (B,), position of the token in column 0.
        end: int64 (B,), position behind the last.
        q: (B, H, T, E).
        k: (B, H, T, E).
        v: (B, H, T, E).
        x: (B, T, D), or (B, T, 0) where nothing is projected from it.
    """

    first: Tensor
    end: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor

    def columns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each position (B, ...), and whether there is one."""
        shape = (-1,) + (1,) * (positions.ndim - 1)
        there = (positions >= self.first.view(shape)) & (positions < self.end.view(shape))
        return (positions - self.first.view(shape)).masked_fill(~there, 0), there


class Members(NamedTuple):
    """Regions (B, R) and their tokens (B, R, M).

    Attributes:
        q: (B, H, R, M, E).
        k: likewise.
        v: likewise.
        there: bool (B, 1, R, M, 1), whether there is a token.
        asking: int64 (B, R), columns of the tokens by which regions are numbered.
        kept: all tokens.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    there: Tensor
    asking: Tensor
    kept: Kept

    def averages(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, R, E), averaged by the query (B, H, R, E) of each region."""
        scores = (self.k * query[..., None, :]).sum(dim=-1, keepdim=True) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~self.there, torch.finfo(scores.dtype).min).softmax(dim=-2)
        return (weights * self.k).sum(dim=-2), (weights * self.v).sum(dim=-2)

    def of_asking(self, x: Tensor) -> Tensor:
        """Rows of all tokens (B, H, T, ...) or (B, T, D) to those of the asking ones."""
        return take(x, self.asking)


Summarizer = Callable[[Members], tuple[Tensor, Tensor]]
"""Keys and values (B, H, R, E) of regions."""


class Summaries(NamedTuple):
    """Summaries of regions.

    Attributes:
        numbers: int64 (B, R), as `Sights.number` makes them.
        keys: (B, H, R, E).
        values: (B, H, R, E).
    """

    numbers: Tensor
    keys: Tensor
    values: Tensor

    def join(self, other: Summaries) -> Summaries:
        """These and others."""
        return Summaries(*(torch.cat(pair, dim=pair[0].ndim // 2) for pair in zip(self, other, strict=True)))

    def columns(self, numbers: Tensor) -> Tensor:
        """Where the regions of these numbers (B, ...) stand; anywhere for those that there are not."""
        ordered, order = self.numbers.sort(dim=1)
        places = torch.searchsorted(ordered, numbers.flatten(1).contiguous()).clamp_max(ordered.shape[1] - 1)
        return order.gather(1, places).view(numbers.shape)


class Sights:
    """One plan, or several that need the same tokens; their regions are numbered together."""

    def __init__(self, plans: Sequence[StreamPlan]) -> None:
        self.plans = plans
        self.kinds: list[StreamRegions] = [kind for plan in plans for kind in plan.regions]

    def number(self, kind: int, regions: Tensor) -> Tensor:
        """Numbers of the regions of a kind among those of all kinds."""
        return (regions * len(self.kinds) + kind).masked_fill(regions >= NO_REGION, NO_REGION)

    def kept(self, lengths: Tensor) -> Tensor:
        """Numbers (B, R) of the summaries that are needed after so many tokens (B,), `NO_REGION` at the end."""
        found = [self.number(index, kind.kept(lengths)) for index, kind in enumerate(self.kinds)]
        numbers = torch.cat(found, dim=1).sort(dim=1).values
        return numbers[:, : max([0, *(numbers < NO_REGION).sum(dim=1).tolist()])]

    def first(self, lengths: Tensor) -> Tensor:
        """The first token that is still needed after so many (B,)."""
        return self.plans[0].first(lengths)

    def summarise(self, kept: Kept, wanted: Sequence[tuple[int, Tensor]], summarizer: Summarizer) -> Summaries:
        """Summaries of regions (B, R) of some kinds, behind one of nothing, so that there is always a column."""
        nothing = kept.k.new_zeros(*kept.k.shape[:2], 1, kept.k.shape[3])
        found = [Summaries(torch.full_like(kept.first[:, None], NO_REGION), nothing, nothing)]
        for index, regions in wanted:
            for some in regions.split(self._height(kept, regions, index), dim=1) if regions.numel() else ():
                args = (self.kinds[index], kept, some, summarizer)
                keys, values = checkpoint(_summarise, *args, use_reentrant=False, preserve_rng_state=True)  # pyright: ignore[reportGeneralTypeIssues] - checkpoint has no types
                found.append(Summaries(self.number(index, some), keys, values))
        return Summaries(*(torch.cat(parts, dim=parts[0].ndim // 2) for parts in zip(*found, strict=True)))

    def closed(self, before: Tensor, after: Tensor) -> list[tuple[int, Tensor]]:
        """Regions that are whole after so many tokens (B,), and were not before."""
        return [(index, some) for index, kind in enumerate(self.kinds) for some in kind.closed(before, after)]

    def needed(self, lengths: Tensor) -> list[tuple[int, Tensor]]:
        """Regions that are needed after so many tokens (B,)."""
        found = ((index, kind.kept(lengths)) for index, kind in enumerate(self.kinds))
        return [(index, column) for index, regions in found for column in _by_size(self.kinds[index], regions)]

    def attend(self, q: Tensor, positions: Tensor, kept: Kept, summaries: Summaries, log_size: bool) -> Tensor:
        """What queries (B, H, L, E) at these positions (B, L) get, by each plan and on average over the plans."""
        offset, found = 0, []
        for plan in self.plans:
            kinds = range(offset, offset + len(plan.regions))
            offset = kinds.stop
            found.append(self._attend_plan(plan, kinds, q, positions, kept, summaries, log_size))
        return found[0] if len(found) == 1 else torch.stack(found).mean(dim=0)

    def _attend_plan(
        self,
        plan: StreamPlan,
        kinds: range,
        q: Tensor,
        positions: Tensor,
        kept: Kept,
        summaries: Summaries,
        log_size: bool,
    ) -> Tensor:
        smallest = torch.finfo(q.dtype).min / 2  # finite: an invalid token may see nothing
        widest = sum(x.shape[-1] for x in (plan.direct(positions), *(self.kinds[i].seen(positions) for i in kinds)))
        height = max(1, LARGEST_SLICE // max(1, q[:, :, 0].numel() * widest))
        found = []
        for some, places in zip(q.split(height, dim=2), positions.split(height, dim=1), strict=True):
            columns, there = kept.columns(plan.direct(places))
            numbers, bias = [], [torch.zeros_like(there, dtype=q.dtype).masked_fill(~there, smallest)]
            for kind in kinds:
                regions = self.kinds[kind].seen(places)
                numbers.append(self.number(kind, regions))
                sizes = self.kinds[kind].sizes(regions).to(q.dtype).clamp_min(1)
                added = sizes.log() if log_size else torch.zeros_like(sizes)
                bias.append(added.masked_fill(regions >= NO_REGION, smallest))
            of_summaries = summaries.columns(torch.cat(numbers, dim=2))
            args = (some, kept, summaries, columns, of_summaries, torch.cat(bias, dim=2))
            found.append(checkpoint(_attend_indexed, *args, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(found, dim=2)  # pyright: ignore[reportArgumentType] - checkpoint has no types

    def _height(self, kept: Kept, regions: Tensor, kind: int) -> int:
        members = int(self.kinds[kind].sizes(regions.masked_fill(regions >= NO_REGION, 0)).max())
        return max(1, LARGEST_SLICE // max(1, kept.k[:, :, 0].numel() * members))


def _by_size(kind: StreamRegions, regions: Tensor) -> Iterator[Tensor]:
    """The columns of regions (B, R), together where all that there are have one size."""
    sizes = kind.sizes(regions)[regions < NO_REGION]
    yield from (regions,) if bool((sizes == sizes[:1]).all()) else regions.split(1, dim=1)


def _summarise(kind: StreamRegions, kept: Kept, regions: Tensor, summarizer: Summarizer) -> tuple[Tensor, Tensor]:
    columns, there = kept.columns(kind.members(regions))
    q, k, v = (take(x, columns) for x in (kept.q, kept.k, kept.v))
    return summarizer(Members(q, k, v, there[:, None, ..., None], kept.columns(regions)[0], kept))


def _attend_indexed(
    q: Tensor, kept: Kept, summaries: Summaries, columns: Tensor, of_summaries: Tensor, bias: Tensor
) -> Tensor:
    k, v = (
        torch.cat((take(tokens, columns), take(regions, of_summaries)), dim=3)
        for tokens, regions in ((kept.k, summaries.keys), (kept.v, summaries.values))
    )
    with full_precision(q.device):
        scores = (k @ q[..., None])[..., 0] / math.sqrt(q.shape[-1]) + bias[:, None]
        return (scores.softmax(dim=-1)[..., None, :] @ v)[..., 0, :]
