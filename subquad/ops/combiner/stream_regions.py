"""Combiner's plans along a stream: which tokens and regions a token sees, when a region is whole, and of what.

A region is numbered by a token: by its last one, or, where every token of a row has a region, by that token. In causal
form a region is whole before anyone sees it, so that it is summarised once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

NO_REGION = 2**40
"""Stands for no token and no region, behind all of them."""


def stretch(first: Tensor, step: int, count: Tensor) -> Tensor:
    """The numbers first, first + step, ..., `count` of them in each row (..., largest count), then `NO_REGION`."""
    index = torch.arange(max([0, *count.flatten().tolist()]), device=count.device)
    return (first[..., None] + step * index).masked_fill(index >= count[..., None], NO_REGION)


class StreamRegions(ABC):
    """One kind of regions. Numbers of tokens and regions are int64; `NO_REGION` fills up rows."""

    @abstractmethod
    def seen(self, positions: Tensor) -> Tensor:
        """Regions that the tokens at these positions (...) see: (..., C)."""

    def kept(self, lengths: Tensor) -> Tensor:
        """Regions that a token at or behind these positions (B,) may see, out of those whole before: (B, R)."""
        return self.seen(lengths)

    @abstractmethod
    def closed(self, before: Tensor, after: Tensor) -> list[Tensor]:
        """Regions that are whole after so many tokens (B,), and were not before: each (B, R), of about one size."""

    @abstractmethod
    def members(self, regions: Tensor) -> Tensor:
        """Tokens of regions (B, R): (B, R, M)."""

    @abstractmethod
    def sizes(self, regions: Tensor) -> Tensor:
        """How many they are."""


@dataclass(frozen=True)
class Segments(StreamRegions):
    """Segments of `size` tokens, each numbered by its last."""

    size: int

    def seen(self, positions: Tensor) -> Tensor:
        """All before the token's own."""
        return stretch(torch.full_like(positions, self.size - 1), self.size, positions // self.size)

    def closed(self, before: Tensor, after: Tensor) -> list[Tensor]:
        """One for each border passed."""
        first = before // self.size
        return [stretch((first + 1) * self.size - 1, self.size, after // self.size - first)]

    def members(self, regions: Tensor) -> Tensor:
        """`size` tokens up to the last."""
        return stretch(regions - self.size + 1, 1, torch.full_like(regions, self.size))

    def sizes(self, regions: Tensor) -> Tensor:
        """All the same."""
        return torch.full_like(regions, self.size)


@dataclass(frozen=True)
class DoublingBlocks(StreamRegions):
    """Aligned blocks of 2, 4, 8, ... tokens with a later sibling. Exactly one ends at a token of odd position."""

    def seen(self, positions: Tensor) -> Tensor:
        """A block for every set bit of the position but the lowest, which ends where that bit begins to count."""
        most = max([0, *positions.flatten().tolist()])
        level = torch.arange(1, max(1, most.bit_length()), device=positions.device)
        above = positions[..., None] >> level
        return ((above << level) - 1).masked_fill(above % 2 == 0, NO_REGION)

    def closed(self, before: Tensor, after: Tensor) -> list[Tensor]:
        """Level by level, the blocks of even number."""
        found = []
        for level in range(1, max([0, *after.tolist()]).bit_length()):
            first = (before >> level) + 1 | 1
            count = ((after >> level) - first + 2).clamp_min(0) // 2
            found.append(stretch((first << level) - 1, 2 << level, count))
        return found

    def members(self, regions: Tensor) -> Tensor:
        """As many up to the last as the lowest set bit of their end says."""
        sizes = self.sizes(regions)
        return stretch(regions + 1 - sizes, 1, sizes)

    def sizes(self, regions: Tensor) -> Tensor:
        """The lowest set bit of the end."""
        return (regions + 1) & -(regions + 1)


@dataclass(frozen=True)
class _OfEveryToken(StreamRegions):
    """A region for every token of a grid with rows of `width`, whole when its row is."""

    width: int

    def closed(self, before: Tensor, after: Tensor) -> list[Tensor]:
        """Those of the rows that became whole."""
        first, end = (length - length % self.width for length in (before, after))
        return [stretch(first, 1, end - first)]


@dataclass(frozen=True)
class RowParts(_OfEveryToken):
    """Tokens of the row of a token: the whole row, all but the token, those left of it or those right of it."""

    part: Literal["all", "others", "left", "right"]

    def seen(self, positions: Tensor) -> Tensor:
        """Those of the tokens above, unless there is nothing in them."""
        column = positions % self.width
        return stretch(column, self.width, (positions // self.width).masked_fill(self.sizes(column) == 0, 0))

    def kept(self, lengths: Tensor) -> Tensor:
        """All of whole rows."""
        return stretch(torch.zeros_like(lengths), 1, lengths - lengths % self.width)

    def members(self, regions: Tensor) -> Tensor:
        """The part of the row."""
        own, place = (regions % self.width)[..., None], torch.arange(self.width, device=regions.device)
        inside = {"all": place >= 0, "others": place != own, "left": place < own, "right": place > own}[self.part]
        return ((regions - regions % self.width)[..., None] + place).masked_fill(~inside, NO_REGION)

    def sizes(self, regions: Tensor) -> Tensor:
        """Of the part of the row."""
        column = regions % self.width
        whole = torch.full_like(column, self.width)
        return {"all": whole, "others": whole - 1, "left": column, "right": self.width - 1 - column}[self.part]


@dataclass(frozen=True)
class ColumnsAbove(_OfEveryToken):
    """A token and all above it in its column."""

    def seen(self, positions: Tensor) -> Tensor:
        """The other columns, down to the row above."""
        column = torch.arange(self.width, device=positions.device)
        return self.kept(positions).masked_fill(column == (positions % self.width)[..., None], NO_REGION)

    def kept(self, lengths: Tensor) -> Tensor:
        """All columns, down to the last whole row."""
        end = (lengths - lengths % self.width)[..., None]
        above = end - self.width + torch.arange(self.width, device=lengths.device)
        return above.masked_fill(end == 0, NO_REGION)

    def members(self, regions: Tensor) -> Tensor:
        """From the top."""
        sizes = self.sizes(regions)
        return stretch(regions - (sizes - 1) * self.width, self.width, sizes)

    def sizes(self, regions: Tensor) -> Tensor:
        """The number of rows."""
        return (regions // self.width + 1).masked_fill(regions >= NO_REGION, 1)


class StreamPlan(NamedTuple):
    """What a token of a stream sees.

    Attributes:
        unit: tokens of a segment or row, up to itself in which a token sees all.
        column: whether it also sees the tokens above it.
        regions: the others.
        needs_all: whether tokens of earlier units are needed again.
    """

    unit: int
    column: bool
    regions: tuple[StreamRegions, ...]
    needs_all: bool = True

    def direct(self, positions: Tensor) -> Tensor:
        """Tokens that the tokens at these positions (...) see: (..., C)."""
        own = positions % self.unit
        row = stretch(positions - own, 1, own + 1)
        return torch.cat((row, stretch(own, self.unit, positions // self.unit)), dim=-1) if self.column else row

    def first(self, lengths: Tensor) -> Tensor:
        """The first token that is still needed after so many (B,)."""
        return torch.zeros_like(lengths) if self.needs_all else lengths - lengths % self.unit
