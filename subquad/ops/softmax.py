"""The definition of softmax attention over given sets of visible keys.

    s_ij = q_i · k_j / √E      o_i = Σ_j visible exp(s_ij) v_j / Σ_j visible exp(s_ij)

A row with no visible key gives 0 and sends no gradient anywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
    working_dtype = torch.promote_types(q.dtype, torch.float32)
    scores = scale * (q.to(working_dtype) @ k.to(working_dtype).mT)
    anything = visible.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~visible & anything, -math.inf)  # a row without any key keeps finite scores
    weights = scores.softmax(dim=-1) * anything
    lse = scores.logsumexp(dim=-1).masked_fill(~anything[..., 0], -math.inf)
    return (weights @ v.to(working_dtype)).to(q.dtype), lse
