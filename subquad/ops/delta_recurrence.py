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

from subquad.ops.chunks import decay_gradient, in_chunks, multiply_add, put_chunks, segments
from subquad.ops.decayed_pairs import Decays, decayed_pairs, decayed_pairs_gradient, decays
from subquad.ops.precision import full_precision


def delta_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, before: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """The result (B, H, L, Ev) and the matrix after the last token (B, H, E, Ev).

    Args:
        q: (B, H, L, E), float32 or wider, as all others.
        k: (B, H, L, E).
        v: (B, H, L, Ev).
        log_decay: (B, H, L, 1) or (B, H, L, E), finite, at most 0.
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
    decays: Decays
    since_start: Tensor
    until_end: Tensor
    of_chunk: Tensor
    pairs: Tensor
    inverse: Tensor
    w: Tensor
    u: Tensor
    matrices: Tensor


def _make(tensors: tuple[Tensor, ...], part: slice, before: Tensor, chunk: int) -> _Segment:
    q, k, v, log_decay, beta = (in_chunks(tensor, part, chunk) for tensor in tensors)
    decay = decays(log_decay)
    since_start, until_end = decay.since_start(), decay.until_end()
    of_chunk = since_start[..., -1:, :].mT
    pairs = decayed_pairs(k, k, decay).tril_(-1)
    inverse = unit_lower_inverse(pairs * beta)
    w, u = inverse @ (beta * since_start * k), inverse @ (beta * v)
    matrices = _scan(before, of_chunk, k * until_end, w, u)
    return _Segment(q, k, v, beta, decay, since_start, until_end, of_chunk, pairs, inverse, w, u, matrices)


def unit_lower_inverse(strict: Tensor) -> Tensor:
    """(I + M)^-1 of strictly lower triangular matrices M (..., C, C)."""
    identity = torch.eye(strict.shape[-1], dtype=strict.dtype, device=strict.device).expand_as(strict)
    return torch.linalg.solve_triangular(strict, identity, upper=False, unitriangular=True)


def _scan(before: Tensor, decay: Tensor, keys: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """The matrix before each chunk and after the last, (N + 1, B, H, E, Ev); u becomes u - w S, in place."""
    matrices = u.new_empty((u.shape[0] + 1, *before.shape))
    matrices[0] = before
    heads = matrices.flatten(1, 2)
    w, u, keys, decay = (tensor.flatten(1, 2) for tensor in (w, u, keys, decay))
    for i in range(u.shape[0]):
        torch.baddbmm(u[i], w[i], heads[i], alpha=-1, out=u[i])
        torch.mul(heads[i], decay[i], out=heads[i + 1])
        torch.baddbmm(heads[i + 1], keys[i].mT, u[i], out=heads[i + 1])
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
    keys, w, reads, grad_u = (tensor.flatten(1, 2) for tensor in (s.k * s.until_end, s.w, reads, grad_u))
    decay = s.of_chunk.flatten(1, 2)
    for i in reversed(range(reads.shape[0])):
        grad_u[i].baddbmm_(keys[i], heads[i + 1])
        torch.addcmul(reads[i], heads[i + 1], decay[i], out=heads[i]).baddbmm_(w[i].mT, grad_u[i], alpha=-1)
    return gradients


class _DeltaRecurrence(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, before: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        out, matrix, starts = torch.empty_like(v), before, []
        for part in segments(k.shape[3], v, chunk):
            starts.append(matrix)
            s = _make((q, k, v, log_decay, beta), part, matrix, chunk)
            mixed = decayed_pairs(s.q, s.k, s.decays) @ s.u
            put_chunks(out, part, multiply_add(mixed, s.q * s.since_start, s.matrices[:-1]))
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
                of_tokens, of_totals, of_matrices = _gradients(s, in_chunks(grad_out, part, ctx.chunk), grad_matrix)
                for whole, piece in zip(grads, of_tokens, strict=True):
                    put_chunks(whole, part, piece)
                if grad_decay is not None:
                    width = log_decay.shape[-1]
                    put_chunks(grad_decay, part, decay_gradient(of_totals, s.matrices[1:], of_matrices[1:], width))
                grad_matrix = of_matrices[0]
        grad_q, grad_k, grad_v, grad_beta = grads
        return grad_q, grad_k, grad_v, grad_decay, grad_beta, grad_matrix, None


def _gradients(s: _Segment, grad: Tensor, grad_after: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Gradients of q, k, v and β, of the running totals, and of the matrices of a segment."""
    before = s.matrices[:-1]
    grad_u = decayed_pairs(s.q, s.k, s.decays).mT @ grad
    of_matrices = _scan_back(grad_after, s, (s.q * s.since_start).mT @ grad, grad_u)
    solved = s.inverse.mT @ grad_u
    grad_v = s.beta * solved
    missed = multiply_add(torch.mul(s.pairs @ s.u, -1).add_(s.v), s.k * -s.since_start, before)  # u = β missed
    grad_beta = (solved * missed).sum(dim=-1, keepdim=True)
    grad_q, as_written = decayed_pairs_gradient(grad @ s.u.mT, s.q, s.k, s.decays)
    grad_q.addcmul_(grad @ before.mT, s.since_start)
    of_pairs = (grad_v @ s.u.mT).tril_(-1).neg_()
    as_asked, as_found = decayed_pairs_gradient(of_pairs, s.k, s.k, s.decays)
    as_asked.addcmul_(grad_v @ before.mT, s.since_start, value=-1)
    as_written.add_(as_found).addcmul_(s.u @ of_matrices[1:].mT, s.until_end)
    of_totals = s.q * grad_q + s.k * (as_asked - as_written)
    return (grad_q, as_asked.add_(as_written), grad_v, grad_beta), of_totals, of_matrices
