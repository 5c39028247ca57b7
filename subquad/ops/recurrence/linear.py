"""Linear recurrences that forget: a matrix is decayed, written with every key and value, and read with every query.

    additive:     S_t = diag(α_t) S_{t-1} + k_t v_tᵀ
    delta rule:   S_t = diag(α_t) S_{t-1} + β_t k_t (v_t - (diag(α_t) S_{t-1})ᵀ k_t)ᵀ
    both:         o_t = S_tᵀ q_t                       α_t in (0, 1]: a number, or one for each channel of the key

The delta rule writes what the decayed matrix doesn't return for the key yet, so that with β = 1 and |k| = 1 it replaces
the value that was stored. Not here: feature maps, scales, norms. Everything is computed in float32 or wider.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.precision import full_precision, wide_dtype
from subquad.ops.recurrence.additive import additive_recurrence
from subquad.ops.recurrence.chunks import chunk_size
from subquad.ops.recurrence.delta import delta_recurrence

CHUNK = 32
"""Tokens per chunk; the result doesn't depend on it."""


class Recurred(NamedTuple):
    """What a recurrence gives.

    Attributes:
        out: (B, H, L, Ev), the dtype of v.
        after: (B, H, E, Ev), the matrix after the last token, float32 or wider.
    """

    out: Tensor
    after: Tensor


def recurrence_by_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    beta: Tensor | None = None,
    before: Tensor | None = None,
    valid: Tensor | None = None,
) -> Recurred:
    """The definition, one token after the other. Arguments and result as in `recurrence`."""
    wide = wide_dtype(v)
    k, log_decay, beta = _silent(k, log_decay, beta, valid)
    matrix = k.new_zeros((*k.shape[:2], k.shape[3], v.shape[3]), dtype=wide) if before is None else before.to(wide)
    out = []
    for t in range(q.shape[2]):
        if log_decay is not None:
            matrix = matrix * log_decay[:, :, t, :, None].to(wide).exp()
        written, key = v[:, :, t].to(wide), k[:, :, t].to(wide)
        if beta is not None:
            written = beta[:, :, t, None].to(wide) * (written - torch.einsum("bhef,bhe->bhf", matrix, key))
        matrix = matrix + key[..., None] * written[..., None, :]
        out.append(torch.einsum("bhef,bhe->bhf", matrix, q[:, :, t].to(wide)))
    return Recurred(torch.stack(out, dim=2).to(v.dtype), matrix)


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    beta: Tensor | None = None,
    before: Tensor | None = None,
    valid: Tensor | None = None,
    chunk: int = CHUNK,
) -> Recurred:
    """A linear recurrence with decay in time and memory linear in the length, chunk by chunk.

    Args:
        q: (B, H, L, E), queries.
        k: (B, H, L, E), keys.
        v: (B, H, L, Ev), values.
        log_decay: (B, H, L, 1) or (B, H, L, E), log α, finite and at most 0; None for α = 1.
        beta: (B, H, L), how much of the difference the delta rule writes; None for the additive recurrence.
        before: (B, H, E, Ev), the matrix that earlier tokens left; None for zeros.
        valid: bool (B, L), True for real tokens; another token neither decays nor writes.
        chunk: tokens per chunk, rounded down to a power of two: speed only.

    Raises:
        ValueError: shapes that don't fit together, or a chunk below 1.
    """
    _check_shapes(q, k, v, log_decay, beta, before, valid)
    if chunk < 1:
        raise ValueError(f"recurrence: chunk must be at least 1, got {chunk}")
    wide = wide_dtype(v)
    chunk = chunk_size(chunk, q.shape[2])
    k, log_decay, beta = _silent(k, log_decay, beta, valid)
    if before is None:
        before = k.new_zeros((*k.shape[:2], k.shape[3], v.shape[3]), dtype=wide)
    q, k, values, before = (tensor.to(wide) for tensor in (q, k, v, before))
    log_decay = None if log_decay is None else log_decay.to(wide)
    with full_precision(q.device):
        if beta is None:
            out, after = additive_recurrence(q, k, values, log_decay, before, chunk)
        else:
            out, after = delta_recurrence(q, k, values, log_decay, beta[..., None].to(wide), before, chunk)
    return Recurred(out.to(v.dtype), after)


def _silent(
    k: Tensor, log_decay: Tensor | None, beta: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Keys, log-decays and β of invalid tokens set to 0."""
    if valid is None:
        return k, log_decay, beta
    invalid = ~valid[:, None, :]
    return (
        k.masked_fill(invalid[..., None], 0.0),
        None if log_decay is None else log_decay.masked_fill(invalid[..., None], 0.0),
        None if beta is None else beta.masked_fill(invalid, 0.0),
    )


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    before: Tensor | None,
    valid: Tensor | None,
) -> None:
    if q.ndim != 4 or q.shape != k.shape or k.shape[:3] != v.shape[:-1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q, k, v))
        raise ValueError(f"recurrence: expected q, k (B, H, L, E) and v (B, H, L, Ev), got {shapes}")
    batch, heads, length, width = k.shape
    if q.shape[2] == 0:
        raise ValueError("recurrence: there are no tokens; pass at least one")
    if log_decay is not None and (log_decay.shape[:-1] != k.shape[:3] or log_decay.shape[-1] not in (1, width)):
        expected = f"({batch}, {heads}, {length}, 1 or {width})"
        raise ValueError(f"recurrence: log_decay must have shape {expected}, got {tuple(log_decay.shape)}")
    expected_shapes = (
        ("beta", beta, (batch, heads, length)),
        ("before", before, (batch, heads, width, v.shape[3])),
        ("valid", valid, (batch, length)),
    )
    for name, tensor, expected in expected_shapes:
        if tensor is not None and tensor.shape != expected:
            raise ValueError(f"recurrence: {name} must have shape {expected}, got {tuple(tensor.shape)}")
