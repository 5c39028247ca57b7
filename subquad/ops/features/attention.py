"""Linear attention: the kernel product φ(q)·φ(k) in place of exp(q·k), summed over keys before queries are seen.

    o_i = Σ_j (φ(q_i)·φ(k_j)) v_j / (Σ_j φ(q_i)·φ(k_j) + ε)        j over all keys, or over j <= i

Here the features are ready. Sums are kept in float32 or wider: a bfloat16 running sum stops growing after 256 terms.
`sums.py` has the form over all keys, `causal.py` the causal one, both for any feature map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.features.causal import CHUNK, Settings, causal_sums
from subquad.ops.features.maps import Ready
from subquad.ops.features.sums import read_sums, sum_keys
from subquad.ops.precision import wide_dtype

DENOMINATOR_EPSILON = 1e-6
"""Added to every denominator, so that a row without keys gives 0 (the value of the official Linear Transformer)."""


def linear_attention_by_pairs(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, normalize: bool = True, valid: Tensor | None = None
) -> Tensor:
    """The definition, quadratic in L. Arguments and result as in `linear_attention`."""
    wide = wide_dtype(q)
    weights = q.to(wide) @ k.to(wide).mT
    if causal:
        weights = weights.tril()
    if valid is not None:
        weights = weights.masked_fill(~valid[:, None, None, :], 0.0)
        v = v.masked_fill(~valid[:, None, :, None], 0.0)
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
    epsilon = DENOMINATOR_EPSILON if normalize else None
    if causal:
        return causal_sums(q, k, v, None, Settings(Ready(), epsilon, CHUNK), valid)[0]
    return read_sums(q, sum_keys(k, v, Ready(), valid), Ready(), epsilon=epsilon)


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
