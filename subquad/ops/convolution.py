"""Convolution along the length, each head with a kernel of its own that serves all its channels.

y_i = Σ_t w_t x_(i + t - ⌊K / 2⌋)        t = 0..K-1, tokens outside the sequence are 0
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.precision import full_precision, wide_dtype

BLOCK = 64
"""Tokens whose products with their neighbours give the gradient of the kernel in one matrix product."""

SMALL_HEAD = 2**15
"""Numbers of the heads that are worth running together although their windows are copied for that."""


def convolve_heads_by_channels(x: Tensor, kernels: Tensor, added: Tensor) -> Tensor:
    """The definition: heads as channels; arguments and result as in `convolve_heads`."""
    size = kernels.shape[1]
    return added + F.conv2d(x, kernels[:, None, :, None].to(x.dtype), padding=(size // 2, 0), groups=x.shape[1])


def convolve_heads(x: Tensor, kernels: Tensor, added: Tensor) -> Tensor:
    """Convolve and add; with channels last, which on the CPU is ten times faster, and kernel gradients a hundred times.

    Args:
        x: (B, H, L, E), any strides; nothing is copied where the heads of a token lie beside each other in memory.
        kernels: (H, K), K odd.
        added: (B, H, L, E), to which the convolution of x is added; the dtype of x.

    Returns:
        (B, H, L, E), the dtype of x, laid out as (B, L, H, E).
    """
    if x.device.type != "cpu" or not x.numel():
        return convolve_heads_by_channels(x, kernels, added)
    return _Convolution.apply(x, kernels, added)  # pyright: ignore[reportReturnType] - apply has no types


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor, added: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernels)
        with full_precision(x.device):
            return _convolve(x, kernels).add_(added)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, kernels = ctx.saved_tensors
        wants_x, wants_kernels, _ = ctx.needs_input_grad
        with full_precision(x.device):
            of_x = _convolve(grad, kernels.flip(1)) if wants_x else None
            return of_x, _kernel_gradients(grad, x, kernels) if wants_kernels else None, grad


def _convolve(x: Tensor, kernels: Tensor) -> Tensor:
    wide, (_, heads, _, width), size = wide_dtype(x), x.shape, kernels.shape[1]
    channels_last = x.to(wide).transpose(1, 2).flatten(2).mT[:, :, None]  # (B, H * E, 1, L)
    weights = kernels.to(wide).repeat_interleave(width, dim=0)[:, None, None]
    y = F.conv2d(channels_last, weights, padding=(0, size // 2), groups=heads * width)
    return y[:, :, 0].mT.unflatten(2, (heads, width)).transpose(1, 2).to(x.dtype)


def _kernel_gradients(grad: Tensor, x: Tensor, kernels: Tensor) -> Tensor:
    """Σ over examples, tokens and channels of grad_i x_(i + t - ⌊K / 2⌋): diagonals of products of blocks."""
    wide, size = wide_dtype(x), kernels.shape[1]
    block = min(BLOCK, x.shape[2])
    missing, reach = -x.shape[2] % block, block + size - 1
    together = max(1, SMALL_HEAD // (x.shape[2] * x.shape[3]))
    total = torch.zeros_like(kernels, dtype=wide)
    for first in range(0, x.shape[1], together):
        some = slice(first, first + together)
        for example, of_example in zip(x[:, some], grad[:, some], strict=True):
            rows = F.pad(of_example.to(wide), (0, 0, 0, missing)).unflatten(1, (-1, block))
            padded = F.pad(example.to(wide), (0, 0, size // 2, size // 2 + missing))
            products = (rows @ padded.unfold(1, reach, block)).sum(dim=1)
            diagonals = products.as_strided((len(products), block, size), (block * reach, reach + 1, 1))
            total[some] += diagonals.sum(dim=1)
    return total.to(kernels.dtype)
