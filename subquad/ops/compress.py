"""Compression along the length: S tokens become R rows, by a matrix or by blocks of neighbours.

    matrix:        row r = Σ_j P_rj x_j
    mean, largest: row r = the mean, or in each channel the largest, of the tokens of block r
    weighted:      row r = Σ_t w_t x_(r c + t), channel by channel      c: tokens of a block

All take heads (B, H, S, E) to (B, H, R, E). Blocks follow each other without overlap; the last one may be shorter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.onednn import SMALLEST_PRODUCT, product


def compress_by_matmul(x: Tensor, matrices: Tensor) -> Tensor:
    """The definition; arguments and result as in `compress`."""
    return matrices @ x


def compress(x: Tensor, matrices: Tensor) -> Tensor:
    """Sums of tokens with given weights: one product for all heads of an example that share a matrix.

    Products too small for that are left to a batched one.

    Args:
        x: (B, H, S, E), any strides; nothing is copied where the heads of a token lie beside each other in memory.
        matrices: (1, R, S), or (H, R, S) for one per head; the dtype of x.

    Returns:
        (B, H, R, E).
    """
    size = matrices.shape[1] * x[0].numel() // matrices.shape[0] if x.numel() else 0
    if x.device.type != "cpu" or size < SMALLEST_PRODUCT:
        return compress_by_matmul(x, matrices)
    return _Compression.apply(x, matrices)  # pyright: ignore[reportReturnType] - apply has no types


class _Compression(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Tensor) -> Tensor:
        wants_x, wants_matrices = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_matrices else None, matrices if wants_x else None)
        ctx.count = matrices.shape[0]
        return _products(matrices.contiguous(), x)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        x, matrices = ctx.saved_tensors
        of_x = None if matrices is None else _products(matrices.mT.contiguous(), grad)
        return of_x, None if x is None else _sum_of_products(grad, x, ctx.count)


def _products(matrices: Tensor, x: Tensor) -> Tensor:
    """Matrices (G, M, S) times x (B, H, S, E), each for H / G heads: (B, H, M, E)."""
    groups = _beside_each_other(x, matrices.shape[0])
    found = [_stack([product(p, tokens.T) for p, tokens in zip(matrices, example, strict=True)]) for example in groups]
    return _stack(found).unflatten(3, (-1, x.shape[3])).transpose(2, 3).flatten(1, 2)


def _sum_of_products(rows: Tensor, x: Tensor, count: int) -> Tensor:
    """Σ over examples and the heads of a group of rows (B, H, R, E) times x (B, H, S, E), transposed: (count, R, S)."""
    examples = zip(_beside_each_other(rows, count), _beside_each_other(x, count), strict=True)
    found = (_stack([product(r, tokens) for r, tokens in zip(*pair, strict=True)]) for pair in examples)
    total = next(found)
    for part in found:
        total += part
    return total


def _beside_each_other(x: Tensor, count: int) -> Tensor:
    """(B, H, S, E) -> (B, count, S, H / count * E): the heads of a group side by side."""
    return x.unflatten(1, (count, -1)).transpose(2, 3).flatten(3)


def _stack(tensors: list[Tensor]) -> Tensor:
    """`torch.stack` without a copy of a single tensor."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def block_means(x: Tensor, size: int, valid: Tensor | None = None) -> Tensor:
    """Mean of the valid tokens of each block; 0 where there are none.

    Args:
        x: (B, H, S, E).
        size: c, tokens of a block.
        valid: bool (B, S).
    """
    real = torch.ones_like(x[:1, :1, :, :1]) if valid is None else valid[:, None, :, None].to(x.dtype)
    counts = _in_blocks(real, size, 0.0).sum(dim=3).clamp_min(1)
    return _in_blocks(_fill_invalid(x, valid, 0.0), size, 0.0).sum(dim=3) / counts


def block_maxima(x: Tensor, size: int, valid: Tensor | None = None) -> Tensor:
    """Largest value among the valid tokens of each block, channel by channel; 0 where there are none.

    Equal values share the gradient. Arguments as in `block_means`.
    """
    largest = _in_blocks(_fill_invalid(x, valid, -torch.inf), size, -torch.inf).amax(dim=3)
    return largest if valid is None else largest.masked_fill(largest == -torch.inf, 0.0)


def block_sums(x: Tensor, weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """A convolution whose stride is its kernel, channel by channel; tokens that are invalid or missing count as 0.

    Args:
        x: (B, H, S, E).
        weights: (1, c, E), or (H, c, E) for one per head.
        valid: bool (B, S).
    """
    blocks = _in_blocks(_fill_invalid(x, valid, 0.0), weights.shape[1], 0.0)
    return (blocks * weights[:, None]).sum(dim=3)


def _fill_invalid(x: Tensor, valid: Tensor | None, value: float) -> Tensor:
    return x if valid is None else x.masked_fill(~valid[:, None, :, None], value)


def _in_blocks(x: Tensor, size: int, value: float) -> Tensor:
    """(B, H, S, E) -> (B, H, R, size, E), filled up with `value`."""
    missing = -x.shape[2] % size
    filled = F.pad(x, (0, 0, 0, missing), value=value) if missing else x
    return filled.unflatten(2, (-1, size))
