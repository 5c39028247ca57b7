"""Attention through landmarks: the softmax matrix rebuilt from a few of its columns and rows, the Nyström method.

    q̃, k̃ = means of m segments of q and k
    F = softmax(q k̃ᵀ / √E)    A = softmax(q̃ k̃ᵀ / √E)    B = softmax(q̃ kᵀ / √E)        o = F A⁺ (B v)

A⁺ is the pseudo-inverse by iteration, for each example and head on its own. Segments follow each other, as equal as the
length allows: the first L mod m hold one token more. Needs L >= m.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.fused import fused_backward, fused_forward
from subquad.ops.precision import full_precision, wide_dtype


def landmark_attention_by_matrices(
    q: Tensor, k: Tensor, v: Tensor, *, landmarks: int, iterations: int, valid: Tensor | None = None
) -> Tensor:
    """The definition; arguments and result as in `landmark_attention`."""
    wide = wide_dtype(q)
    wide_q, wide_k, wide_v = (_zero_invalid(x.to(wide), valid) for x in (q, k, v))
    segments, scale = _segments(q.shape[2], landmarks, valid, wide_q), 1 / math.sqrt(q.shape[3])
    with full_precision(q.device):
        few_q, few_k = segments.means(wide_q), segments.means(wide_k)
        rows = _softmax(scale * few_q @ wide_k.mT, segments.key_bias) @ wide_v
        columns = _softmax(scale * wide_q @ few_k.mT, segments.landmark_bias)
        out = columns @ _through_landmarks(few_q, few_k, rows, segments, scale, iterations)
    return out.to(q.dtype)


def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, *, landmarks: int, iterations: int, valid: Tensor | None = None
) -> Tensor:
    """Attention through landmarks in time and memory linear in the length.

    Args:
        q: (B, H, L, E).
        k: (B, H, L, E).
        v: (B, H, L, E).
        landmarks: m, at most L.
        iterations: of the pseudo-inverse.
        valid: bool (B, L), True for real tokens: the others take no part, and a segment of theirs is no landmark.

    Returns:
        (B, H, L, E), the dtype of q; float32 or wider inside. What invalid queries get has no meaning.
    """
    options = {"landmarks": landmarks, "iterations": iterations}
    if not q.numel():
        return landmark_attention_by_matrices(q, k, v, **options, valid=valid)
    q, k, v = (_zero_invalid(x, valid) for x in (q, k, v))
    return _LandmarkAttention.apply(q, k, v, landmarks, iterations, valid)  # pyright: ignore[reportReturnType] - apply has no types


def pseudo_inverse(a: Tensor, iterations: int) -> Tensor:
    """Moore-Penrose inverse of non-negative matrices (..., m, m) with rows that sum to 1, by iteration.

    Z₀ = Aᵀ / (‖A‖₁ ‖A‖_∞), then Z ← Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4, of third order. The norm of rows is 1;
    that of columns is each matrix's own.
    """
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = a.mT / a.sum(dim=-2).amax(dim=-1)[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az))) / 4
    return z


class _Segments(NamedTuple):
    """The landmarks of a batch.

    Attributes:
        shares: (B or 1, 1, m, 1), one over the number of valid tokens of a segment.
        present: bool (B, 1, m, 1), whether a segment has any; None where all have. Where no token is valid, all count.
        key_bias: (B, 1, 1, L), 0 or -inf; None where all are valid.
        landmark_bias: (B, 1, 1, m), likewise.
    """

    shares: Tensor
    present: Tensor | None
    key_bias: Tensor | None
    landmark_bias: Tensor | None

    def means(self, x: Tensor) -> Tensor:
        """(B, H, L, E) -> (B, H, m, E); invalid tokens of x must be 0."""
        return torch.cat([part.sum(dim=3) for part in _parts(x, self.shares.shape[2])], dim=2) * self.shares

    def add_mean_gradients(self, total: Tensor, gradients: Tensor) -> None:
        """Add to `total` (B, H, L, E) what means with these gradients (B, H, m, E) send to the tokens."""
        longer = total.shape[2] % self.shares.shape[2]
        shared = (gradients * self.shares)[:, :, :, None]
        for part, share in zip(_parts(total, shared.shape[2]), shared.tensor_split((longer,), dim=2), strict=True):
            part += share


def _parts(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Views of the longer and of the other segments of x: (B, H, n, size, E) each."""
    size, longer = divmod(x.shape[2], count)
    first, second = x.tensor_split((longer * (size + 1),), dim=2)
    return first.unflatten(2, (longer, size + 1)), second.unflatten(2, (count - longer, size))


def _segments(length: int, count: int, valid: Tensor | None, like: Tensor) -> _Segments:
    real = like.new_ones(1, 1, length, 1) if valid is None else valid[:, None, :, None].to(like.dtype)
    sizes = torch.cat([part.sum(dim=3) for part in _parts(real, count)], dim=2)
    shares = 1 / sizes.clamp_min(1)
    if valid is None:
        return _Segments(shares, None, None, None)
    nothing = ~valid.any(dim=1)[:, None]
    present = (sizes[:, 0, :, 0] > 0) | nothing
    biases = (torch.zeros_like(x, dtype=like.dtype).masked_fill(~x, -torch.inf) for x in (valid | nothing, present))
    key_bias, landmark_bias = (bias[:, None, None] for bias in biases)
    return _Segments(shares, present[:, None, :, None], key_bias, landmark_bias)


def _through_landmarks(
    few_q: Tensor, few_k: Tensor, rows: Tensor, segments: _Segments, scale: float, iterations: int
) -> Tensor:
    """A⁺ rows, (B, H, m, E); a segment without tokens is connected to itself alone, so that it is of no consequence."""
    between = _softmax(scale * few_q @ few_k.mT, segments.landmark_bias)
    if segments.present is not None:
        identity = torch.eye(between.shape[-1], dtype=between.dtype, device=between.device)
        between = torch.where(segments.present, between, identity)
    return pseudo_inverse(between, iterations) @ rows


def _softmax(scores: Tensor, bias: Tensor | None) -> Tensor:
    return (scores if bias is None else scores + bias).softmax(dim=-1)


def _zero_invalid(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else x.masked_fill(~valid[:, None, :, None], 0.0)


class _LandmarkAttention(torch.autograd.Function):
    """Both long softmaxes are fused; the short one and the pseudo-inverse are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, landmarks: int, iterations: int, valid: Tensor | None
    ) -> Tensor:
        wide, scale = wide_dtype(q), 1 / math.sqrt(q.shape[3])
        wide_q, wide_k, wide_v = (x.to(wide) for x in (q, k, v))
        segments = _segments(q.shape[2], landmarks, valid, wide_q)
        with full_precision(q.device):
            few_q, few_k = segments.means(wide_q), segments.means(wide_k)
            rows, rows_lse = fused_forward(few_q, wide_k, wide_v, scale, segments.key_bias)
            values = _through_landmarks(few_q, few_k, rows, segments, scale, iterations)
            out, lse = fused_forward(wide_q, few_k, values, scale, segments.landmark_bias)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, few_q, few_k, rows, rows_lse, values)
        ctx.segments, ctx.iterations = segments, iterations
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, few_q, few_k, rows, rows_lse, values = ctx.saved_tensors
        segments, scale, given, dtype = ctx.segments, 1 / math.sqrt(q.shape[3]), q.dtype, lse.dtype
        grad, q, k, v, out = (x.to(dtype) for x in (grad, q, k, v, out))
        with full_precision(q.device):
            of_q, of_few_k, of_values = fused_backward(grad, q, few_k, values, out, lse, scale, segments.landmark_bias)
            leaves = tuple(x.detach().requires_grad_() for x in (few_q, few_k, rows))
            with torch.enable_grad():
                again = _through_landmarks(leaves[0], leaves[1], leaves[2], segments, scale, ctx.iterations)
            of_few_q, more_of_few_k, of_rows = torch.autograd.grad(again, leaves, of_values)
            more_of_few_q, of_k, of_v = fused_backward(of_rows, few_q, k, v, rows, rows_lse, scale, segments.key_bias)
        segments.add_mean_gradients(of_q, of_few_q + more_of_few_q)
        segments.add_mean_gradients(of_k, of_few_k + more_of_few_k)
        return *(x.to(given) for x in (of_q, of_k, of_v)), None, None, None
