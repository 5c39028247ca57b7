"""Slices of heads and tokens: enough at a time for large matrix products, and little enough to stay in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

SLICE_TOKENS = 4096
"""Tokens in a slice, at most."""

SLICE_NUMBERS = 2**19
"""Features in a slice, about."""


class Workspace:
    """Memory of what a slice needs for a while, the same for every slice: every fresh 4 kB cost a page fault."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._like, self._dtype = like, dtype
        self._memory: dict[str, Tensor] = {}

    def of(self, name: str, *shape: int) -> Tensor:
        """A contiguous tensor of this shape; what the name stood for before is lost."""
        if torch.compiler.is_compiling():
            return self._like.new_empty(shape, dtype=self._dtype)  # a compiler plans memory itself
        numbers, memory = math.prod(shape), self._memory.get(name)
        if memory is None or memory.numel() < numbers:
            memory = self._memory[name] = self._like.new_empty(numbers, dtype=self._dtype)
        return memory[:numbers].view(shape)


class HeadGroup(NamedTuple):
    """Some heads of some examples; indexes tensors (B, H, ...).

    Attributes:
        examples: slice of B.
        heads: slice of H.
    """

    examples: slice
    heads: slice

    def hidden(self, valid: Tensor, tokens: slice) -> Tensor:
        """Which keys don't count, bool (B', 1, T, 1), from those that do, (B, S)."""
        return ~valid[self.examples, None, tokens, None]

    def chunks(self, x: Tensor, tokens: slice, count: int) -> Tensor:
        """A view (N, B', H', C, ...) of x (B, H, L, ...): N = `count` chunks of C tokens."""
        part = x[(*self, tokens)]
        return part.unflatten(2, (count, part.shape[2] // count)).movedim(2, 0)


def head_groups(x: Tensor, features: int, tokens: int = SLICE_TOKENS) -> Iterator[HeadGroup]:
    """The heads of a slice of x (B, H, L, ...): as many as have about `SLICE_NUMBERS` features together.

    Args:
        x: what is sliced.
        features: of each token.
        tokens: of a slice, at most.
    """
    batch, num_heads, length = x.shape[:3]
    size = max(1, SLICE_NUMBERS // max(1, min(length, tokens) * features))
    examples, heads = max(1, size // num_heads), min(size, num_heads)
    for first in range(0, batch, examples):
        for head in range(0, num_heads, heads):
            yield HeadGroup(slice(first, min(first + examples, batch)), slice(head, min(head + heads, num_heads)))


def token_slices(length: int) -> Iterator[slice]:
    """The tokens of a sequence, those of a slice at a time."""
    for start in range(0, length, SLICE_TOKENS):
        yield slice(start, min(start + SLICE_TOKENS, length))
