"""A lower triangular Toeplitz matrix that mixes the tokens of every channel alike: a causal convolution.

y_i = Σ_(j <= i) w_(i - j) x_j

One transform over the whole sequence rounds relative to the largest of all tokens, those of the future too. Here tokens
are cut into blocks of N: inside a block the small matrix is written out, and a transform of 2 h numbers adds to every
second stretch of h tokens what the h tokens before it send, for h = N, 2 N, 4 N, ... So nothing that is later than a
token takes part in its result, nor in the gradient of what is later than itself.

Cost O(L N) products and O(L log² L) for the transforms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.positions.toeplitz import channel_slices, toeplitz_matrix, transform_flops
from subquad.ops.precision import full_precision, wide_dtype

BLOCK = 64
"""N, a power of 2; a shorter sequence is a single block."""


def causal_toeplitz_product(lags: Tensor, x: Tensor) -> Tensor:
    """The product, in float32 or wider; autograd keeps the arguments alone.

    The definition is `toeplitz_product_by_matrix`.

    Args:
        lags: (L,), w from 0 to L - 1.
        x: (B, L, F).

    Returns:
        (B, L, F), the dtype of x.
    """
    return _CausalToeplitzProduct.apply(lags, x)  # pyright: ignore[reportReturnType] - apply has no types


def causal_product_flops(length: int, channels: int) -> int:
    """FLOPs of one product of so many channels, the transforms of the lags included."""
    block, size = _block(length), _filled(length)
    near = 2 * size * block * channels
    return near + sum((2 * pairs * channels + 1) * transform_flops(2 * h) for h, pairs in _stretches(length))


class _CausalToeplitzProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lags: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(lags, x)
        length, y = x.shape[1], torch.empty_like(x)
        wide = lags.to(wide_dtype(x))
        near, kernels = _near(wide), _kernels(wide)
        for some in channel_slices(x, _filled(length)):
            channels = _channels_first(x[..., some], wide.dtype)
            with full_precision(x.device):
                mixed = (channels.unflatten(-1, (-1, len(near))) @ near.mT).flatten(-2)
            for (h, pairs), kernel in zip(_stretches(length), kernels, strict=True):
                spectrum = torch.fft.rfft(_halves(channels, h, pairs)[..., :h], 2 * h)
                _halves(mixed, h, pairs)[..., h:] += torch.fft.irfft(spectrum * kernel, 2 * h)[..., h:]
            y[..., some] = mixed[..., :length].mT
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        lags, x = ctx.saved_tensors
        length, of_x = x.shape[1], torch.empty_like(x)
        wide = lags.to(wide_dtype(x))
        near, kernels = _near(wide), _kernels(wide)
        of_near, of_kernels = torch.zeros_like(near), [torch.zeros_like(kernel) for kernel in kernels]
        for some in channel_slices(x, _filled(length)):
            channels, upstream = (_channels_first(tensor[..., some], wide.dtype) for tensor in (x, grad))
            blocks = [tensor.unflatten(-1, (-1, len(near))) for tensor in (channels, upstream)]
            with full_precision(x.device):
                of_channels = (blocks[1] @ near).flatten(-2)
                of_near += blocks[1].flatten(0, -2).mT @ blocks[0].flatten(0, -2)
            for (h, pairs), kernel, of_kernel in zip(_stretches(length), kernels, of_kernels, strict=True):
                received = torch.fft.rfft(_behind_zeros(_halves(upstream, h, pairs)[..., h:]), 2 * h)
                sent = torch.fft.rfft(_halves(channels, h, pairs)[..., :h], 2 * h)
                _halves(of_channels, h, pairs)[..., :h] += torch.fft.irfft(received * kernel.conj(), 2 * h)[..., :h]
                of_kernel += (sent.conj() * received).sum(dim=(0, 1, 2))
            of_x[..., some] = of_channels[..., :length].mT
        return _of_lags(of_near, of_kernels, length).to(lags.dtype), of_x


def _of_lags(of_near: Tensor, of_kernels: list[Tensor], length: int) -> Tensor:
    """Gradient (L,) of the lags, from those of the small matrix and of the spectra."""
    result = of_near.new_zeros(2 * _filled(length))
    for lag in range(len(of_near)):
        result[lag] = of_near.diagonal(-lag).sum()
    for of_kernel in of_kernels:
        size = 2 * (len(of_kernel) - 1)
        result[1:size] += torch.fft.irfft(of_kernel, size)[1:]
    return result[:length]


def _near(lags: Tensor) -> Tensor:
    """The matrix inside a block."""
    block = _block(len(lags))
    return toeplitz_matrix(torch.nn.functional.pad(lags[:block], (0, max(0, block - len(lags)))), block)


def _kernels(lags: Tensor) -> list[Tensor]:
    """Spectra of the first 2 h lags, zeros behind the last."""
    return [torch.fft.rfft(lags[: 2 * h], 2 * h) for h, _ in _stretches(len(lags))]


def _stretches(length: int) -> Iterator[tuple[int, int]]:
    """The h, and how many pairs of stretches of h tokens begin their second before the end."""
    h = BLOCK
    while h < length:
        yield h, -(-(length - h) // (2 * h))
        h *= 2


def _halves(channels: Tensor, h: int, pairs: int) -> Tensor:
    """A view (..., pairs, 2 h) of (..., T)."""
    return channels[..., : 2 * h * pairs].unflatten(-1, (pairs, 2 * h))


def _behind_zeros(second: Tensor) -> Tensor:
    return torch.nn.functional.pad(second, (second.shape[-1], 0))


def _channels_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L, F) -> (B, F, T), zeros behind the last token."""
    filled = x.new_zeros(x.shape[0], x.shape[2], _filled(x.shape[1]), dtype=dtype)
    filled[..., : x.shape[1]] = x.mT
    return filled


def _block(length: int) -> int:
    return min(BLOCK, _filled(length))


def _filled(length: int) -> int:
    """The power of 2 that holds all tokens."""
    return 1 << (length - 1).bit_length() if length > 1 else 1
