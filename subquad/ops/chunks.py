"""Cutting a sequence into segments and those into chunks, and scanning a matrix from chunk to chunk.

A segment is what is worked on at once: so few chunks that its temporaries stay in the cache, whatever the length.
Its tensors have the chunks first, (N, B, H, C, E), so that a step of a scan takes all heads together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS = 1 << 19
"""Numbers in the largest tensor of a segment, 2 MB of float32: the best of 0.5 to 8 MB."""


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
    x = x[:, :, part]
    missing = -x.shape[2] % chunk
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    return x.unflatten(2, (-1, chunk)).permute(2, 0, 1, 3, 4).contiguous()


def put_chunks(x: Tensor, part: slice, chunks: Tensor) -> None:
    """Inverse of `in_chunks`: write a segment (N, B, H, C, E) into x (B, H, L, E), dropping what is behind its end."""
    target, tokens = x[:, :, part], chunks.permute(1, 2, 0, 3, 4)
    chunk = tokens.shape[3]
    whole = target.shape[2] // chunk
    if whole:
        target[:, :, : whole * chunk].unflatten(2, (whole, chunk)).copy_(tokens[:, :, :whole])
    if whole < tokens.shape[2]:
        target[:, :, whole * chunk :] = tokens[:, :, whole, : target.shape[2] - whole * chunk]


def multiply_add(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """X += first @ second, in place; all (N, B, H, ·, ·), x contiguous. Returns x."""
    target = x.flatten(0, 2)
    torch.baddbmm(target, first.flatten(0, 2), second.flatten(0, 2), out=target)
    return x


def scan(before: Tensor, decay: Tensor, writes: Tensor) -> Tensor:
    """The matrix before each chunk and after the last.

    Args:
        before: (B, H, E, Ev).
        decay: (N, B, H, 1 or E, 1).
        writes: (N, B, H, E, Ev).

    Returns:
        (N + 1, B, H, E, Ev).
    """
    matrices = writes.new_empty((writes.shape[0] + 1, *writes.shape[1:]))
    matrices[0] = before
    for i in range(writes.shape[0]):
        torch.addcmul(writes[i], matrices[i], decay[i], out=matrices[i + 1])
    return matrices


def scan_back(after: Tensor, decay: Tensor, reads: Tensor) -> Tensor:
    """Gradients of the matrices of `scan`, last to first, from that of the last and those of what chunks read."""
    gradients = reads.new_empty((reads.shape[0] + 1, *reads.shape[1:]))
    gradients[-1] = after
    for i in reversed(range(reads.shape[0])):
        torch.addcmul(reads[i], gradients[i + 1], decay[i], out=gradients[i])
    return gradients


def decay_gradient(of_totals: Tensor, after: Tensor, grad_after: Tensor, width: int) -> Tensor:
    """Gradient of the log-decays of every chunk, (N, B, H, C, width).

    A log-decay is part of the running totals of its own and all later tokens of the chunk, and scales all of what the
    chunk leaves behind but what is written after it, which those totals account for.

    Args:
        of_totals: (N, B, H, C, E), gradient of the running totals, less what `after` brings.
        after: (N, B, H, E, Ev), the matrices after each chunk.
        grad_after: their gradients.
        width: 1 for one log-decay for all channels, else E.
    """
    left = (after * grad_after).sum(dim=-1)[..., None, :]
    if width == 1:
        of_totals, left = of_totals.sum(dim=-1, keepdim=True), left.sum(dim=-1, keepdim=True)
    running = of_totals.cumsum(dim=-2)
    return left + running[..., -1:, :] - running + of_totals
