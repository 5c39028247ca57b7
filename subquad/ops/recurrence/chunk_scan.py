"""Taking a matrix from chunk to chunk of a segment, forwards and backwards; tensors (N, B, H, ·, ·)."""

from __future__ import annotations

import torch
from torch import Tensor


def scan(before: Tensor, decay: Tensor | None, writes: Tensor) -> Tensor:
    """The matrix before each chunk and after the last.

    Args:
        before: (B, H, E, Ev).
        decay: (N, B, H, 1 or E, 1), that of whole chunks; None for none.
        writes: (N, B, H, E, Ev).

    Returns:
        (N + 1, B, H, E, Ev).
    """
    matrices = writes.new_empty((writes.shape[0] + 1, *writes.shape[1:]))
    matrices[0] = before
    for i in range(writes.shape[0]):
        step(matrices[i], decay, i, writes[i], matrices[i + 1])
    return matrices


def scan_back(after: Tensor, decay: Tensor | None, reads: Tensor) -> Tensor:
    """Gradients of the matrices of `scan`, last to first, from that of the last and those of what chunks read."""
    gradients = reads.new_empty((reads.shape[0] + 1, *reads.shape[1:]))
    gradients[-1] = after
    for i in reversed(range(reads.shape[0])):
        step(gradients[i + 1], decay, i, reads[i], gradients[i])
    return gradients


def step(matrix: Tensor, decay: Tensor | None, index: int, more: Tensor, result: Tensor) -> None:
    """Write decay[index] * matrix + more into the result."""
    if decay is None:
        torch.add(matrix, more, out=result)
    else:
        torch.addcmul(more, matrix, decay[index], out=result)


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
