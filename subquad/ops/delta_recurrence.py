"""The delta rule in chunks, with its gradient.

    S_t = diag(α_t) S_{t-1} + k_t u_tᵀ, u_t = β_t (v_t - (diag(α_t) S_{t-1})ᵀ k_t), o_t = S_tᵀ q_t

Given u it is the additive recurrence. In a chunk, with G the running sum of log α and S the matrix before it, u solves
a unit lower triangular system; its inverse is split off once, so that the scan from chunk to chunk only multiplies (the
WY form of products of Householder matrices):

    (I + M) u = diag(β) (v - (k ⊙ exp(G)) S)      M = diag(β) tril(P, -1), P: the decayed pairs of k and k
    u = (I + M)^-1 diag(β) v - W S                W = (I + M)^-1 diag(β) (k ⊙ exp(G))

Kept for the gradient are the arguments and one matrix for each segment; the rest is made again, segment by segment.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from subquad.ops.chunk_scan import decay_gradient, step
from subquad.ops.chunks import add_scaled, in_chunks, multiply_add, put_chunks, scaled, segments
from subquad.ops.decayed_pairs import Factors, decayed_pairs, decayed_pairs_gradient, factors
from subquad.ops.precision import full_precision


def delta_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor, before: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """The result (B, H, L, Ev) and the matrix after the last token (B, H, E, Ev).

    Args:
        q: (B, H, L, E), float32 or wider, as all others.
        k: (B, H, L, E).
        v: (B, H, L, Ev).
        log_decay: (B, H, L, 1) or (B, H, L, E), finite, at most 0; None for no decay.
        beta: (B, H, L, 1).
        before: (B, H, E, Ev), the matrix that earlier tokens left.
        chunk: tokens per chunk, a power of two.
    """
    return _DeltaRecurrence.apply(q, k, v, log_decay, beta, before, chunk)  # pyright: ignore[reportReturnType] - untyped


class _Segment(NamedTuple):
    """A stretch of chunks, tensors (N, B, H, ·, ·) as in the formulas above; `inverse` is (I + M)^-1."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    decay: Factors
    pairs: Tensor
    inverse: Tensor
    w: Tensor
    u: Tensor
    matrices: Tensor


def _make(tensors: tuple[Tensor | None, ...], part: slice, before: Tensor, chunk: int) -> _Segment:
    """The segment of q, k, v, the log-decays or None, and β."""
    q, k, v, log_decay, beta = (None if tensor is None else in_chunks(tensor, part, chunk) for tensor in tensors)
    assert q is not None
    assert k is not None
    assert v is not None
    assert beta is not None
    decay = factors(log_decay)
    pairs = decayed_pairs(k, k, decay.inside).tril_(-1)
    inverse = unit_lower_inverse(pairs * beta)
    w, u = inverse @ scaled(k * beta, decay.since_start), inverse @ (v * beta)
    matrices = _scan(before, decay, k, w, u)
    return _Segment(q, k, v, beta, decay, pairs, inverse, w, u, matrices)


def unit_lower_inverse(strict: Tensor) -> Tensor:
    """(I + M)^-1 of strictly lower triangular matrices M (..., C, C)."""
    identity = torch.eye(strict.shape[-1], dtype=strict.dtype, device=strict.device).expand_as(strict)
    return torch.linalg.solve_triangular(strict, identity, upper=False, unitriangular=True)


def _scan(before: Tensor, decay: Factors, k: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """The matrix before each chunk and after the last, (N + 1, B, H, E, Ev); u becomes u - w S, in place."""
    matrices = u.new_empty((u.shape[0] + 1, *before.shape))
    matrices[0] = before
    heads = matrices.flatten(1, 2)
    keys, w, u = (tensor.flatten(1, 2) for tensor in (scaled(k, decay.until_end), w, u))
    for i in range(u.shape[0]):
        torch.baddbmm(u[i], w[i], heads[i], alpha=-1, out=u[i])
        faded = heads[i] if decay.of_chunk is None else heads[i] * decay.of_chunk[i].flatten(0, 1)
        torch.baddbmm(faded, keys[i].mT, u[i], out=heads[i + 1])
    return matrices


def _scan_back(after: Tensor, s: _Segment, reads: Tensor, grad_u: Tensor) -> Tensor:
    """Gradients of the matrices of a segment, (N + 1, B, H, E, Ev); completes `grad_u` in place.

    Args:
        after: (B, H, E, Ev), gradient of the last matrix.
        s: the segment.
        reads: (N, B, H, E, Ev), gradients of the matrices from what their chunks read.
        grad_u: (N, B, H, C, Ev), gradients of u from the results of its own chunk.
    """
    gradients = reads.new_empty((reads.shape[0] + 1, *after.shape))
    gradients[-1] = after
    heads = gradients.flatten(1, 2)
    keys, w, of_u = (tensor.flatten(1, 2) for tensor in (scaled(s.k, s.decay.until_end), s.w, grad_u))
    for i in reversed(range(reads.shape[0])):
        torch.baddbmm(of_u[i], keys[i], heads[i + 1], out=of_u[i])
        step(gradients[i + 1], s.decay.of_chunk, i, reads[i], gradients[i])
        torch.baddbmm(heads[i], w[i].mT, of_u[i], alpha=-1, out=heads[i])
    return gradients


class _DeltaRecurrence(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor, before: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        out, matrix, starts = torch.empty_like(v), before, []
        for part in segments(k.shape[3], v, chunk):
            starts.append(matrix)
            s = _make((q, k, v, log_decay, beta), part, matrix, chunk)
            mixed = decayed_pairs(s.q, s.k, s.decay.inside) @ s.u
            put_chunks(out, part, multiply_add(mixed, scaled(s.q, s.decay.since_start), s.matrices[:-1]))
            matrix = s.matrices[-1].clone()
        ctx.save_for_backward(q, k, v, log_decay, beta, *starts)
        ctx.chunk = chunk
        return out, matrix

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad_out: Tensor, grad_matrix: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, beta, *starts = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in (q, k, v, beta)]
        grad_decay = torch.empty_like(log_decay) if ctx.needs_input_grad[3] else None
        with full_precision(q.device):
            for part, start in zip(reversed(segments(k.shape[3], v, ctx.chunk)), reversed(starts), strict=True):
                s = _make((q, k, v, log_decay, beta), part, start, ctx.chunk)
                g = _gradients(s, in_chunks(grad_out, part, ctx.chunk), grad_matrix)
                for whole, piece in zip(grads, (g.q, g.asked.add(g.written), g.v, g.beta), strict=True):
                    put_chunks(whole, part, piece)
                if grad_decay is not None:
                    of_totals, width = s.q * g.q + s.k * (g.asked - g.written), log_decay.shape[-1]
                    put_chunks(grad_decay, part, decay_gradient(of_totals, s.matrices[1:], g.matrices[1:], width))
                grad_matrix = g.matrices[0]
        grad_q, grad_k, grad_v, grad_beta = grads
        return grad_q, grad_k, grad_v, grad_decay, grad_beta, grad_matrix, None


class _Gradients(NamedTuple):
    """Gradients of a segment; those of a key apart as it is asked for and as it is written."""

    q: Tensor
    asked: Tensor
    written: Tensor
    v: Tensor
    beta: Tensor
    matrices: Tensor


def _gradients(s: _Segment, grad: Tensor, grad_after: Tensor) -> _Gradients:
    before, (inside, since_start, until_end, _) = s.matrices[:-1], s.decay
    of_u = decayed_pairs(s.q, s.k, inside).mT @ grad
    of_matrices = _scan_back(grad_after, s, scaled(s.q, since_start).mT @ grad, of_u)
    solved = s.inverse.mT @ of_u
    grad_v = solved * s.beta
    found = multiply_add(s.pairs @ s.u, scaled(s.k, since_start), before)
    grad_beta = (solved * (s.v - found)).sum(dim=-1, keepdim=True)  # u = β (v - found)
    grad_q, written = decayed_pairs_gradient(grad @ s.u.mT, s.q, s.k, inside)
    add_scaled(grad_q, grad @ before.mT, since_start)
    of_pairs = (grad_v @ s.u.mT).tril_(-1)
    asked, as_found = decayed_pairs_gradient(of_pairs.neg_(), s.k, s.k, inside)
    add_scaled(asked, grad_v @ before.mT, since_start, sign=-1)
    add_scaled(written.add_(as_found), s.u @ of_matrices[1:].mT, until_end)
    return _Gradients(grad_q, asked, written, grad_v, grad_beta, of_matrices)
