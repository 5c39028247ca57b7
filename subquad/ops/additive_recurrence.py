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

from subquad.ops.chunks import decay_gradient, in_chunks, multiply_add, put_chunks, scan, scan_back, segments
from subquad.ops.decayed_pairs import Decays, decayed_pairs, decayed_pairs_gradient, decays
from subquad.ops.precision import full_precision


def additive_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, before: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """The result (B, H, L, Ev) and the matrix after the last token (B, H, E, Ev).

    Args:
        q: (B, H, L, E), float32 or wider, as all others.
        k: (B, H, L, E).
        v: (B, H, L, Ev).
        log_decay: (B, H, L, 1) or (B, H, L, E), finite, at most 0.
        before: (B, H, E, Ev), the matrix that earlier tokens left.
        chunk: tokens per chunk, a power of two.
    """
    return _AdditiveRecurrence.apply(q, k, v, log_decay, before, chunk)  # pyright: ignore[reportReturnType] - untyped


class _Segment(NamedTuple):
    """A stretch of chunks: the tokens (N, B, H, C, ·), their decays, those of whole chunks, matrices."""

    q: Tensor
    k: Tensor
    v: Tensor
    decays: Decays
    since_start: Tensor
    until_end: Tensor
    of_chunk: Tensor
    matrices: Tensor


def _make(tensors: tuple[Tensor, ...], part: slice, before: Tensor, chunk: int) -> _Segment:
    q, k, v, log_decay = (in_chunks(tensor, part, chunk) for tensor in tensors)
    decay = decays(log_decay)
    since_start, until_end = decay.since_start(), decay.until_end()
    of_chunk = since_start[..., -1:, :].mT
    matrices = scan(before, of_chunk, (k * until_end).mT @ v)
    return _Segment(q, k, v, decay, since_start, until_end, of_chunk, matrices)


class _AdditiveRecurrence(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, before: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        out, matrix, starts = torch.empty_like(v), before, []
        for part in segments(k.shape[3], v, chunk):
            starts.append(matrix)
            s = _make((q, k, v, log_decay), part, matrix, chunk)
            mixed = decayed_pairs(s.q, s.k, s.decays) @ s.v
            put_chunks(out, part, multiply_add(mixed, s.q * s.since_start, s.matrices[:-1]))
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
        parts = segments(k.shape[3], v, ctx.chunk)
        grads = [torch.empty_like(tensor) for tensor in (q, k, v)]
        grad_decay = torch.empty_like(log_decay) if ctx.needs_input_grad[3] else None
        with full_precision(q.device):
            for part, start in zip(reversed(parts), reversed(starts), strict=True):
                s = _make((q, k, v, log_decay), part, start, ctx.chunk)
                grad = in_chunks(grad_out, part, ctx.chunk)
                of_matrices = scan_back(grad_matrix, s.of_chunk, (s.q * s.since_start).mT @ grad)
                of_tokens = _token_gradients(s, grad, of_matrices)
                for whole, piece in zip(grads, of_tokens, strict=True):
                    put_chunks(whole, part, piece)
                if grad_decay is not None:
                    of_totals = s.q * of_tokens[0] - s.k * of_tokens[1]
                    width = log_decay.shape[-1]
                    put_chunks(grad_decay, part, decay_gradient(of_totals, s.matrices[1:], of_matrices[1:], width))
                grad_matrix = of_matrices[0]
        return *grads, grad_decay, grad_matrix, None


def _token_gradients(s: _Segment, grad: Tensor, of_matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of a segment."""
    grad_q, grad_k = decayed_pairs_gradient(grad @ s.v.mT, s.q, s.k, s.decays)
    grad_q.addcmul_(grad @ s.matrices[:-1].mT, s.since_start)
    grad_k.addcmul_(s.v @ of_matrices[1:].mT, s.until_end)
    grad_v = decayed_pairs(s.q, s.k, s.decays).mT @ grad
    return grad_q, grad_k, multiply_add(grad_v, s.k * s.until_end, of_matrices[1:])
