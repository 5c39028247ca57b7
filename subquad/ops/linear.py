"""Linear attention: the kernel product φ(q)·φ(k) in place of exp(q·k), summed over keys before queries are seen.

    o_i = Σ_j (φ(q_i)·φ(k_j)) v_j / (Σ_j φ(q_i)·φ(k_j) + ε)        j over all keys, or over j <= i

Features are applied by the caller, so every function here is plain multilinear algebra. Sums are kept in float32 or
wider: a bfloat16 running sum stops growing after 256 terms. Not here: feature maps, decay, gating.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.precision import full_precision

DENOMINATOR_EPSILON = 1e-6
"""Added to every denominator, so that a row without keys gives 0 (the value of the official Linear Transformer)."""

CHUNK = 64
"""Tokens per chunk of the causal form; the result doesn't depend on it."""


class Sums(NamedTuple):
    """What linear attention remembers of the past.

    Attributes:
        values: (B, H, F, Ev), Σ φ(k) vᵀ.
        features: (B, H, F), Σ φ(k).
    """

    values: Tensor
    features: Tensor


def linear_attention_by_pairs(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, normalize: bool = True, valid: Tensor | None = None
) -> Tensor:
    """The definition, quadratic in L. Arguments and result as in `linear_attention`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = q.to(wide) @ k.to(wide).mT
    if causal:
        weights = weights.tril(diagonal=k.shape[2] - q.shape[2])
    if valid is not None:
        weights = weights.masked_fill(~valid[:, None, None, :], 0.0)
    mixed = weights @ v.to(wide)
    if normalize:
        mixed = mixed / (weights.sum(dim=-1, keepdim=True) + DENOMINATOR_EPSILON)
    return mixed.to(q.dtype)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, normalize: bool = True, valid: Tensor | None = None
) -> Tensor:
    """Linear attention in time and memory linear in the length.

    Args:
        q: (B, H, L, F), features of the queries.
        k: (B, H, S, F), features of the keys; causal: S = L.
        v: (B, H, S, Ev).
        causal: query i sums over keys 0..i only.
        normalize: divide by the sum of the weights (plus 1e-6).
        valid: bool (B, S), True for real keys.

    Returns:
        (B, H, L, Ev), the dtype of q.

    Raises:
        ValueError: shapes that don't fit together.
    """
    _check_shapes(q, k, v, causal, valid)
    wide = torch.promote_types(q.dtype, torch.float32)
    k_wide = zero_keys(k.to(wide), valid)
    with full_precision(q.device):
        if causal:
            return causal_sums(q.to(wide), k_wide, v.to(wide), None, normalize=normalize)[0].to(q.dtype)
        return read_sums(q.to(wide), all_sums(k_wide, v.to(wide)), normalize=normalize).to(q.dtype)


def zero_keys(k: Tensor, valid: Tensor | None) -> Tensor:
    """Features k (B, H, S, F) with those of invalid keys (valid: bool (B, S)) set to 0."""
    return k if valid is None else k.masked_fill(~valid[:, None, :, None], 0.0)


def all_sums(k: Tensor, v: Tensor) -> Sums:
    """Sums over all keys of k (B, H, S, F), v (B, H, S, Ev)."""
    return Sums(k.mT @ v, k.sum(dim=2))


def read_sums(q: Tensor, sums: Sums, *, normalize: bool = True, epsilon: float = DENOMINATOR_EPSILON) -> Tensor:
    """What queries q (B, H, L, F) read from the sums: (B, H, L, Ev); `epsilon` is added to the denominator."""
    mixed = q @ sums.values
    if not normalize:
        return mixed
    return mixed / (q @ sums.features[..., None] + epsilon)


def causal_sums(
    q: Tensor, k: Tensor, v: Tensor, before: Sums | None, *, normalize: bool = True, chunk: int = CHUNK
) -> tuple[Tensor, Sums]:
    """Causal linear attention, chunk by chunk, continuing from the sums of earlier tokens.

    Inside a chunk pairs are summed directly; what lies before it is read from the running sums, so the cost is
    O(L (chunk + F) Ev). Exact for every chunk.

    Args:
        q: (B, H, L, F), float32 or wider, as all others.
        k: (B, H, L, F), zero at invalid keys.
        v: (B, H, L, Ev).
        before: the sums over all earlier tokens, None for none.
        normalize: divide by the sum of the weights.
        chunk: tokens per chunk.

    Returns:
        The result (B, H, L, Ev) and the sums over everything seen so far.
    """
    length = q.shape[2]
    chunk = max(1, min(chunk, length))
    q, k, v = (_in_chunks(tensor, chunk) for tensor in (q, k, v))  # (B, H, N, chunk, ·)
    weights = (q @ k.mT).tril()
    value_sums = _running(k.mT @ v, None if before is None else before.values)
    feature_sums = _running(k.sum(dim=3), None if before is None else before.features)
    mixed = weights @ v + q @ value_sums[:, :, :-1]
    if normalize:
        total = weights.sum(dim=-1, keepdim=True) + q @ feature_sums[:, :, :-1, :, None]
        mixed = mixed / (total + DENOMINATOR_EPSILON)
    after = Sums(value_sums[:, :, -1], feature_sums[:, :, -1])
    return mixed.flatten(2, 3)[:, :, :length], after


def _in_chunks(x: Tensor, chunk: int) -> Tensor:
    """(B, H, L, E) -> (B, H, N, chunk, E), zeros behind the end; contiguous, so that no product copies it again."""
    missing = -x.shape[2] % chunk
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x
    return padded.contiguous().unflatten(2, (-1, chunk))


def _running(per_chunk: Tensor, before: Tensor | None) -> Tensor:
    """Sums before each of the N chunks and after the last: (B, H, N, ...) -> (B, H, N + 1, ...)."""
    first = torch.zeros_like(per_chunk[:, :, :1]) if before is None else before[:, :, None]
    return torch.cat((first, per_chunk), dim=2).cumsum(dim=2)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, causal: bool, valid: Tensor | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"linear_attention: q, k, v must be (B, H, L, E), got {q.ndim}, {k.ndim}, {v.ndim} dimensions")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q, k, v))
        raise ValueError(f"linear_attention: expected q (B, H, L, F), k (B, H, S, F), v (B, H, S, Ev), got {shapes}")
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"linear_attention: causal=True needs as many keys as queries, got {k.shape[2]}, {q.shape[2]}")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != (k.shape[0], k.shape[2])):
        expected = (k.shape[0], k.shape[2])
        raise ValueError(f"linear_attention: valid must be bool {expected}, got {valid.dtype} {tuple(valid.shape)}")
