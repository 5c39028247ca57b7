"""Slices of heads and tokens: enough at a time for large matrix products, and little enough to stay in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

SLICE_TOKENS = 4096
"""Tokens of all heads in a slice, about."""


class Room:
    """Memory of what a slice needs for a while, the same for every slice: every fresh 4 kB cost a page fault."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._like, self._dtype = like, dtype
        self._memory: dict[str, Tensor] = {}

    def of(self, name: str, *shape: int) -> Tensor:
        """A contiguous tensor of this shape; what the name stood for before is lost."""
        numbers, memory = math.prod(shape), self._memory.get(name)
        if memory is None or memory.numel() < numbers:
            memory = self._memory[name] = self._like.new_empty(numbers, dtype=self._dtype)
        return memory[:numbers].view(shape)


class Heads(NamedTuple):
    """Some heads of some examples; indexes tensors (B, H, ...).

    Attributes:
        examples: slice of B.
        heads: slice of H.
    """

    examples: slice
    heads: slice

    def take(self, x: Tensor, dtype: torch.dtype, tokens: slice, hidden: Tensor | None = None) -> Tensor:
        """X (B, H, L, ...) as (G, T, ...), G heads of all examples here and T tokens; a view where one is possible.

        What is `hidden` (bool (G, T, 1)) is 0, whatever x holds there.
        """
        part = x[(*self, tokens)].to(dtype).flatten(0, 1)
        return part if hidden is None else part.masked_fill(hidden, 0.0)

    def chunks(self, x: Tensor, tokens: slice, count: int) -> Tensor:
        """X (B, H, L, ...) as a view (N, B', H', C, ...) of N = `count` chunks of C tokens."""
        part = x[(*self, tokens)]
        return part.view(*part.shape[:2], count, -1, *part.shape[3:]).movedim(2, 0)

    def room(self, x: Tensor, tokens: slice, dtype: torch.dtype) -> Tensor:
        """Where to compute a part of x, (G, T, ...), before `put`: its place itself if that is possible."""
        place = x[(*self, tokens)]
        return place.flatten(0, 1) if place.dtype == dtype else torch.empty_like(place.flatten(0, 1), dtype=dtype)

    def put(self, x: Tensor, part: Tensor, tokens: slice) -> None:
        """Write a part (G, T, ...) to its place in x, unless it is a view of that place and there already."""
        place = x[(*self, tokens)]
        if part.data_ptr() != place.data_ptr():
            place.copy_(part.view(place.shape))

    def put_all(self, x: Tensor, part: Tensor) -> None:
        """Write a part (G, ...) to the place of these heads in x (B, H, ...)."""
        place = x[self]
        place.copy_(part.view(place.shape))

    def hidden(self, valid: Tensor, tokens: slice) -> Tensor:
        """The tokens that don't count, (G, T, 1), by facts about all (bool (B, L))."""
        hidden = ~valid[self.examples, None, tokens]
        return hidden.expand(-1, self.heads.stop - self.heads.start, -1).flatten(0, 1)[..., None]


def head_groups(x: Tensor, fewest: int = 1) -> Iterator[Heads]:
    """The heads of x (B, H, L, ...), of about `SLICE_TOKENS` tokens together, or the fewest heads if that is more."""
    batch, num_heads, length = x.shape[:3]
    size = max(fewest, SLICE_TOKENS // max(1, length))
    examples, heads = max(1, size // num_heads), min(size, num_heads)
    for first in range(0, batch, examples):
        for head in range(0, num_heads, heads):
            yield Heads(slice(first, min(first + examples, batch)), slice(head, min(head + heads, num_heads)))


def token_slices(length: int) -> Iterator[slice]:
    """The tokens of a sequence, those of a slice at a time."""
    for start in range(0, length, SLICE_TOKENS):
        yield slice(start, min(start + SLICE_TOKENS, length))
