"""A Toeplitz matrix that mixes the tokens of every channel alike: a convolution along the whole length.

y_i = Σ_j w_(i - j) x_j
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.precision import wide_dtype

SLICE = 2**20
"""Numbers of the channels, filled up for the transform, that run together."""


def toeplitz_matrix(lags: Tensor, length: int) -> Tensor:
    """The matrix (L, L) of lags (2 L - 1,), or (L,) for a lower triangular one."""
    places = torch.arange(length, device=lags.device)
    index = places[:, None] - places + len(lags) - length
    return lags[index.clamp_min(0)].masked_fill(index < 0, 0.0)


def toeplitz_product_by_matrix(lags: Tensor, x: Tensor) -> Tensor:
    """The definition; as in `toeplitz_product`, or with lags (L,), from 0, for a causal matrix."""
    return torch.einsum("ij,bjf->bif", toeplitz_matrix(lags, x.shape[1]).to(x.dtype), x)


def toeplitz_product(lags: Tensor, x: Tensor) -> Tensor:
    """The product by Fourier transforms, in float32 or wider; autograd keeps the arguments alone.

    Args:
        lags: (2 L - 1,), w of i - j from 1 - L to L - 1.
        x: (B, L, F).

    Returns:
        (B, L, F), the dtype of x.
    """
    return _ToeplitzProduct.apply(lags, x)  # pyright: ignore[reportReturnType] - apply has no types


def transform_length(length: int) -> int:
    """The power of 2 that holds 2 L - 1 numbers, so that what wraps around falls outside of the L results."""
    return 1 << (2 * length - 2).bit_length() if length > 1 else 1


def transform_flops(length: int) -> int:
    """FLOPs of one real transform of so many numbers, a power of 2: half of the 5 N log₂ N of a complex one."""
    return 5 * length * (length.bit_length() - 1) // 2


class _ToeplitzProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lags: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(lags, x)
        size, length = transform_length(x.shape[1]), x.shape[1]
        wide = wide_dtype(x)
        kernel, y = torch.fft.rfft(lags.to(wide), size), torch.empty_like(x)
        for some in channel_slices(x, size):
            spectrum = torch.fft.rfft(x[..., some].to(wide).mT, size)
            y[..., some] = torch.fft.irfft(spectrum * kernel, size)[..., length - 1 : 2 * length - 1].mT
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        lags, x = ctx.saved_tensors
        size, length = transform_length(x.shape[1]), x.shape[1]
        wide = wide_dtype(x)
        kernel, of_x = torch.fft.rfft(lags.to(wide), size).conj(), torch.empty_like(x)
        of_kernel = torch.zeros_like(kernel)
        for some in channel_slices(x, size):
            shifted = torch.nn.functional.pad(grad[..., some].to(wide).mT, (length - 1, 0))
            spectrum = torch.fft.rfft(shifted, size)
            of_x[..., some] = torch.fft.irfft(spectrum * kernel, size)[..., :length].mT
            of_kernel += (torch.fft.rfft(x[..., some].to(wide).mT, size).conj() * spectrum).sum(dim=(0, 1))
        return torch.fft.irfft(of_kernel, size)[: len(lags)].to(lags.dtype), of_x


def channel_slices(x: Tensor, size: int) -> Iterator[slice]:
    """Channels of x (B, L, F), filled up to `size` tokens, that run together.

    There are none in an empty batch, which transforms don't take.
    """
    step = max(1, SLICE // (max(1, x.shape[0]) * size))
    return (slice(start, start + step) for start in range(0, x.shape[2] if len(x) else 0, step))
