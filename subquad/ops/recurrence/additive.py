"""The additive recurrence in chunks, S_t = diag(α_t) S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t, with its gradient.

In a chunk, with G the running sum of log α, C its last token and S the matrix before it:

    o_i = Σ_{j<=i} A_ij v_j + Sᵀ (q_i ⊙ exp(G_i))      A: the decayed pairs of q and k
    S'  = diag(exp(G_C)) S + Σ_j (k_j ⊙ exp(G_C - G_j)) v_jᵀ

Kept for the gradient are the arguments and one matrix for each segment; the rest is made again, segment by segment.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from subquad.ops.chunk_products import multiply_add
from subquad.ops.precision import full_precision
from subquad.ops.recurrence.chunk_scan import decay_gradient, scan, scan_back
from subquad.ops.recurrence.chunks import add_scaled, in_chunks, put_chunks, scaled, segments
from subquad.ops.recurrence.decayed_pairs import Factors, decayed_pairs, decayed_pairs_gradient, factors


def additive_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, before: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """The result (B, H, L, Ev) and the matrix after the last token (B, H, E, Ev).

    Args:
        q: (B, H, L, E), float32 or wider, as all others.
        k: (B, H, L, E).
        v: (B, H, L, Ev).
        log_decay: (B, H, L, 1) or (B, H, L, E), finite, at most 0; None for no decay.
        before: (B, H, E, Ev), the matrix that earlier tokens left.
        chunk: tokens per chunk, a power of two.
    """
    return _AdditiveRecurrence.apply(q, k, v, log_decay, before, chunk)  # pyright: ignore[reportReturnType] - untyped


class _Segment(NamedTuple):
    """A stretch of chunks: the tokens (N, B, H, C, ·), their decays, and the matrices (N + 1, B, H, E, Ev)."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Factors
    matrices: Tensor


def _make(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, part: slice, before: Tensor, chunk: int
) -> _Segment:
    q, k, v = (in_chunks(tensor, part, chunk) for tensor in (q, k, v))
    decay = factors(None if log_decay is None else in_chunks(log_decay, part, chunk))
    return _Segment(q, k, v, decay, scan(before, decay.of_chunk, scaled(k, decay.until_end).mT @ v))


class _AdditiveRecurrence(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, before: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        out, matrix, starts = torch.empty_like(v), before, []
        for part in segments(k.shape[3], v, chunk):
            starts.append(matrix)
            s = _make(q, k, v, log_decay, part, matrix, chunk)
            mixed = _pairs(s) @ s.v
            put_chunks(out, part, multiply_add(mixed, scaled(s.q, s.decay.since_start), s.matrices[:-1]))
            matrix = s.matrices[-1].clone()
        ctx.save_for_backward(q, k, v, log_decay, *starts)
        ctx.chunk = chunk
        return out, matrix

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad_out: Tensor, grad_matrix: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, *starts = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in (q, k, v)]
        grad_decay = torch.empty_like(log_decay) if ctx.needs_input_grad[3] else None
        with full_precision(q.device):
            for part, start in zip(reversed(segments(k.shape[3], v, ctx.chunk)), reversed(starts), strict=True):
                s = _make(q, k, v, log_decay, part, start, ctx.chunk)
                grad = in_chunks(grad_out, part, ctx.chunk)
                of_matrices = scan_back(grad_matrix, s.decay.of_chunk, scaled(s.q, s.decay.since_start).mT @ grad)
                of_tokens = _token_gradients(s, grad, of_matrices)
                for whole, piece in zip(grads, of_tokens, strict=True):
                    put_chunks(whole, part, piece)
                if grad_decay is not None:
                    of_totals, width = s.q * of_tokens[0] - s.k * of_tokens[1], log_decay.shape[-1]
                    put_chunks(grad_decay, part, decay_gradient(of_totals, s.matrices[1:], of_matrices[1:], width))
                grad_matrix = of_matrices[0]
        return *grads, grad_decay, grad_matrix, None


def _pairs(s: _Segment) -> Tensor:
    """(N, B, H, C, C)."""
    return decayed_pairs(s.q[..., None, :, :], s.k, s.decay.inside)[..., 0, :, :]


def _token_gradients(s: _Segment, grad: Tensor, of_matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of a segment."""
    _, since_start, until_end, _ = s.decay
    of_pairs = (grad @ s.v.mT).tril_()[..., None, :, :]
    grad_q, grad_k = decayed_pairs_gradient(of_pairs, s.q[..., None, :, :], s.k, s.decay.inside)
    grad_q = add_scaled(grad_q[..., 0, :, :], grad @ s.matrices[:-1].mT, since_start)
    add_scaled(grad_k, s.v @ of_matrices[1:].mT, until_end)
    return grad_q, grad_k, multiply_add(_pairs(s).mT @ grad, scaled(s.k, until_end), of_matrices[1:])
