"""Cutting a sequence into segments and those into chunks.

A segment is what is worked on at once: so few chunks that its temporaries stay in the cache, whatever the length.
Its tensors have the chunks first, (N, B, H, C, E), so that a step of a scan takes all heads together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS = 1 << 18
"""Numbers in the largest tensor of a segment: 1 MB of float32, the best of 0.1 to 2 MB."""


def chunk_size(chunk: int, length: int) -> int:
    """Tokens per chunk: a power of two, at most `chunk`, and no larger than holds the whole sequence needs."""
    return 1 << min(chunk.bit_length() - 1, (length - 1).bit_length())


def segments(width: int, v: Tensor, chunk: int) -> list[slice]:
    """The tokens of each segment: whole chunks but for the last.

    Args:
        width: E, of the keys.
        v: (B, H, L, Ev), the values.
        chunk: C, tokens per chunk.
    """
    batch, heads, length, value_width = v.shape
    size = chunk * segment_chunks(batch * heads, width, value_width, chunk)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def segment_chunks(heads: int, width: int, value_width: int, chunk: int) -> int:
    """Chunks in a segment; `heads` counts those of all examples."""
    largest = max(width * value_width, chunk * max(width, value_width, chunk))  # of what there is for each chunk
    return max(1, NUMBERS // max(1, heads * largest))


def in_chunks(x: Tensor, part: slice, chunk: int) -> Tensor:
    """A segment of x (B, H, L, E): (N, B, H, C, E), contiguous, zeros behind the end of the sequence."""
    return _chunks(x, part, chunk).contiguous()


def stacked_chunks(first: Tensor, second: Tensor, part: slice, chunk: int) -> Tensor:
    """A segment of two tensors (B, H, L, E): (N, B, H, 2, C, E), contiguous."""
    return torch.stack((_chunks(first, part, chunk), _chunks(second, part, chunk)), dim=3)


def _chunks(x: Tensor, part: slice, chunk: int) -> Tensor:
    x = x[:, :, part]
    missing = -x.shape[2] % chunk
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    return x.unflatten(2, (-1, chunk)).permute(2, 0, 1, 3, 4)


def put_chunks(x: Tensor, part: slice, chunks: Tensor) -> None:
    """Inverse of `in_chunks`: write a segment (N, B, H, C, E) into x (B, H, L, E), dropping what is behind its end."""
    target, tokens = x[:, :, part], chunks.permute(1, 2, 0, 3, 4)
    chunk = tokens.shape[3]
    whole = target.shape[2] // chunk
    if whole:
        target[:, :, : whole * chunk].unflatten(2, (whole, chunk)).copy_(tokens[:, :, :whole])
    if whole < tokens.shape[2]:
        target[:, :, whole * chunk :] = tokens[:, :, whole, : target.shape[2] - whole * chunk]


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    """X times the factor; x itself where there is none."""
    return x if factor is None else x * factor


def add_scaled(x: Tensor, y: Tensor, factor: Tensor | None) -> Tensor:
    """X += y * factor, in place. Returns x."""
    return x.add_(y) if factor is None else x.addcmul_(y, factor)
