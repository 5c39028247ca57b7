"""The definition of softmax attention over given sets of visible keys.

    s_ij = q_i · k_j / √E      o_i = Σ_j visible exp(s_ij) v_j / Σ_j visible exp(s_ij)

A row with no visible key gives 0 and sends no gradient anywhere.
"""

from __future__ import annotations

import math

from torch import Tensor

from subquad.ops.precision import wide_dtype


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """The definition; arguments as in `softmax_attention_with_lse`. Returns (B, H, L, Ev), the dtype of q."""
    return softmax_attention_with_lse(q, k, v, visible, 1 / math.sqrt(q.shape[-1]))[0]


def softmax_attention_with_lse(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The definition.

    Args:
        q: (B, H, L, E).
        k: (B, H, S, E).
        v: (B, H, S, Ev).
        visible: bool, broadcastable to (B, H, L, S), True where query i may use key j.
        scale: factor of the scores.

    Returns:
        out (B, H, L, Ev), the dtype of q, and the log-sum-exp (B, H, L) of the visible scores, -inf where there are
        none; scores and softmax in float32 or wider.
    """
    wide = wide_dtype(q)
    scores = scale * (q.to(wide) @ k.to(wide).mT)
    weights, lse = masked_softmax_with_lse(scores, visible)
    return (weights @ v.to(wide)).to(q.dtype), lse


def masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """The weights of the visible keys.

    Args:
        scores: (..., L, S), finite.
        visible: bool, broadcastable to them.

    Returns:
        (..., L, S), 0 for hidden keys and in rows without a visible one, to which no gradient flows.
    """
    anything = visible.any(dim=-1, keepdim=True)
    return _shown(scores, visible, anything).softmax(dim=-1) * anything


def masked_softmax_with_lse(scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """`masked_softmax`, and the log-sum-exp (..., L) of the visible scores, -inf where there are none."""
    anything = visible.any(dim=-1, keepdim=True)
    shown = _shown(scores, visible, anything)
    lse = shown.logsumexp(dim=-1).masked_fill(~anything[..., 0], -math.inf)
    return shown.softmax(dim=-1) * anything, lse


def _shown(scores: Tensor, visible: Tensor, anything: Tensor) -> Tensor:
    """Scores with hidden keys at -inf; a row without any key keeps finite ones, whose softmax has a gradient."""
    return scores.masked_fill(~visible & anything, -math.inf)
