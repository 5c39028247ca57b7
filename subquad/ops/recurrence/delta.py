"""The delta rule in chunks, with its gradient.

    S_t = diag(α_t) S_{t-1} + β_t k_t e_tᵀ, e_t = v_t - (diag(α_t) S_{t-1})ᵀ k_t, o_t = S_tᵀ q_t

Given e it is the additive recurrence with keys βk. In a chunk, with G the running sum of log α and S the matrix before
it, e solves a unit lower triangular system; its inverse is split off once, so that the scan from chunk to chunk only
multiplies (the WY form of products of Householder matrices):

    (I + M) e = v - (k ⊙ exp(G)) S      M: the decayed pairs of k and βk, below the diagonal
    e = (I + M)^-1 v - W S              W = (I + M)^-1 (k ⊙ exp(G))

Queries and keys are asked alike, for o and for e: they go through the products together. Kept for the gradient are the
arguments and one matrix for each segment; the rest is made again, segment by segment.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from subquad.ops.chunk_products import multiply_add
from subquad.ops.precision import full_precision
from subquad.ops.recurrence.chunk_scan import decay_gradient, step
from subquad.ops.recurrence.chunks import (
    add_scaled,
    in_chunks,
    put_chunks,
    scaled,
    segments,
    stacked_chunks,
)
from subquad.ops.recurrence.decayed_pairs import Factors, decayed_pairs, decayed_pairs_gradient, factors


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
    """A stretch of chunks.

    Attributes:
        asked: (N, B, H, 2, C, E), queries and keys.
        written: (N, B, H, C, E), βk.
        beta: (N, B, H, C, 1).
        decay: the decays.
        pairs: (N, B, H, C, C), of q and βk.
        inverse: (N, B, H, C, C), (I + M)^-1.
        w: (N, B, H, C, E).
        e: (N, B, H, C, Ev).
        matrices: (N + 1, B, H, E, Ev).
    """

    asked: Tensor
    written: Tensor
    beta: Tensor
    decay: Factors
    pairs: Tensor
    inverse: Tensor
    w: Tensor
    e: Tensor
    matrices: Tensor


class _Arguments(NamedTuple):
    """Those of `delta_recurrence`, (B, H, L, ·)."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor


def _make(x: _Arguments, part: slice, before: Tensor, chunk: int) -> _Segment:
    asked, v, beta = stacked_chunks(x.q, x.k, part, chunk), in_chunks(x.v, part, chunk), in_chunks(x.beta, part, chunk)
    decay = factors(None if x.log_decay is None else in_chunks(x.log_decay, part, chunk))
    written = asked[..., 1, :, :] * beta
    pairs, of_keys = decayed_pairs(asked, written, decay.inside).unbind(dim=-3)
    inverse = unit_lower_inverse(of_keys)
    w, e = inverse @ scaled(asked[..., 1, :, :], decay.since_start), inverse @ v
    matrices = _scan(before, decay.of_chunk, scaled(written, decay.until_end), w, e)
    return _Segment(asked, written, beta, decay, pairs, inverse, w, e, matrices)


def unit_lower_inverse(x: Tensor) -> Tensor:
    """(I + M)^-1 (..., C, C), where M is what x (..., C, C) holds below the diagonal."""
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x)
    return torch.linalg.solve_triangular(x, identity, upper=False, unitriangular=True)


def _scan(before: Tensor, decay: Tensor | None, written: Tensor, w: Tensor, e: Tensor) -> Tensor:
    """The matrix before each chunk and after the last, (N + 1, B, H, E, Ev); e becomes e - w S, in place."""
    matrices = e.new_empty((e.shape[0] + 1, *before.shape))
    matrices[0] = before
    heads = matrices.flatten(1, 2)
    written, w, e = (tensor.flatten(1, 2) for tensor in (written, w, e))
    for i in range(e.shape[0]):
        torch.baddbmm(e[i], w[i], heads[i], alpha=-1, out=e[i])
        faded = heads[i] if decay is None else heads[i] * decay[i].flatten(0, 1)
        torch.baddbmm(faded, written[i].mT, e[i], out=heads[i + 1])
    return matrices


def _scan_back(after: Tensor, s: _Segment, reads: Tensor, grad_e: Tensor) -> Tensor:
    """Gradients of the matrices of a segment, (N + 1, B, H, E, Ev); completes `grad_e` in place.

    Args:
        after: (B, H, E, Ev), gradient of the last matrix.
        s: the segment.
        reads: (N, B, H, E, Ev), gradients of the matrices from what their chunks read.
        grad_e: (N, B, H, C, Ev), gradients of e from the results of its own chunk.
    """
    gradients = reads.new_empty((reads.shape[0] + 1, *after.shape))
    gradients[-1] = after
    heads = gradients.flatten(1, 2)
    written, w, of_e = (tensor.flatten(1, 2) for tensor in (scaled(s.written, s.decay.until_end), s.w, grad_e))
    for i in reversed(range(reads.shape[0])):
        torch.baddbmm(of_e[i], written[i], heads[i + 1], out=of_e[i])
        step(gradients[i + 1], s.decay.of_chunk, i, reads[i], gradients[i])
        torch.baddbmm(heads[i], w[i].mT, of_e[i], alpha=-1, out=heads[i])
    return gradients


class _DeltaRecurrence(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor, before: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        x, out, matrix, starts = _Arguments(q, k, v, log_decay, beta), torch.empty_like(v), before, []
        for part in segments(k.shape[3], v, chunk):
            starts.append(matrix)
            s = _make(x, part, matrix, chunk)
            q_read = scaled(s.asked[..., 0, :, :], s.decay.since_start)
            put_chunks(out, part, multiply_add(s.pairs @ s.e, q_read, s.matrices[:-1]))
            matrix = s.matrices[-1].clone()
        ctx.save_for_backward(*x, *starts)
        ctx.chunk = chunk
        return out, matrix

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad_out: Tensor, grad_matrix: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        x, starts = _Arguments(*saved[:5]), saved[5:]
        grads = [torch.empty_like(tensor) for tensor in (x.q, x.k, x.v, x.beta)]
        grad_decay = None
        if x.log_decay is not None and ctx.needs_input_grad[3]:
            grad_decay = torch.empty_like(x.log_decay)
        with full_precision(x.q.device):
            for part, start in zip(reversed(segments(x.k.shape[3], x.v, ctx.chunk)), reversed(starts), strict=True):
                s = _make(x, part, start, ctx.chunk)
                g = _gradients(s, in_chunks(grad_out, part, ctx.chunk), grad_matrix)
                of_q, of_k = g.asked.unbind(dim=-3)
                of_beta = (g.written * s.asked[..., 1, :, :]).sum(dim=-1, keepdim=True)
                of_k = of_k.addcmul(g.written, s.beta)
                for whole, piece in zip(grads, (of_q, of_k, g.v, of_beta), strict=True):
                    put_chunks(whole, part, piece)
                if grad_decay is not None:
                    of_totals, width = (s.asked * g.asked).sum(dim=-3) - s.written * g.written, grad_decay.shape[-1]
                    put_chunks(grad_decay, part, decay_gradient(of_totals, s.matrices[1:], g.matrices[1:], width))
                grad_matrix = g.matrices[0]
        grad_q, grad_k, grad_v, grad_beta = grads
        return grad_q, grad_k, grad_v, grad_decay, grad_beta, grad_matrix, None


class _Gradients(NamedTuple):
    """Gradients of a segment: of what `_Segment` names so, and of the values."""

    asked: Tensor
    written: Tensor
    v: Tensor
    matrices: Tensor


def _gradients(s: _Segment, grad: Tensor, grad_after: Tensor) -> _Gradients:
    inside, since_start, until_end, _ = s.decay
    q_read = scaled(s.asked[..., 0, :, :], since_start)
    of_e = s.pairs.mT @ grad
    of_matrices = _scan_back(grad_after, s, q_read.mT @ grad, of_e)
    grad_v = s.inverse.mT @ of_e
    told = torch.stack((grad, grad_v.neg()), dim=-3)  # to what is asked: by o, and by e, which is less by it
    of_pairs = (told.flatten(-3, -2) @ s.e.mT).unflatten(-2, told.shape[-3:-1]).tril_()
    of_pairs[..., 1, :, :].diagonal(dim1=-2, dim2=-1).zero_()
    asked, written = decayed_pairs_gradient(of_pairs, s.asked, s.written, inside)
    read = (told.flatten(-3, -2) @ s.matrices[:-1].mT).unflatten(-2, told.shape[-3:-1])
    add_scaled(asked, read, None if since_start is None else since_start[..., None, :, :])
    add_scaled(written, s.e @ of_matrices[1:].mT, until_end)
    return _Gradients(asked, written, grad_v, of_matrices)
