"""Softmax attention over given sets of visible keys.

    s_ij = q_i · k_j / √E      o_i = Σ_j visible exp(s_ij) v_j / Σ_j visible exp(s_ij)

A row with no visible key gives 0 and sends no gradient anywhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MASK_ELEMENTS = 2**21
"""Largest mask that `sliced_attention` holds at a time, in elements over the whole batch."""


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


class KeySet(NamedTuple):
    """Which keys a query may use, as facts about tokens; None means no restriction.

    Attributes:
        key_valid: bool (B, S).
        query_segments: int (B, L), together with key_segments: only equal ones see each other.
        key_segments: int (B, S).
        last_key: int64 (B, L): query i sees the keys 0..last_key[i].
    """

    key_valid: Tensor | None = None
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None
    last_key: Tensor | None = None

    def rows(self, start: int, stop: int) -> KeySet:
        """The same facts for the queries start..stop-1."""
        cut_segments = None if self.query_segments is None else self.query_segments[:, start:stop]
        cut_last = None if self.last_key is None else self.last_key[:, start:stop]
        return self._replace(query_segments=cut_segments, last_key=cut_last)

    def first_keys(self, count: int) -> KeySet:
        """The same facts for the keys 0..count-1."""
        cut_valid = None if self.key_valid is None else self.key_valid[:, :count]
        cut_segments = None if self.key_segments is None else self.key_segments[:, :count]
        return self._replace(key_valid=cut_valid, key_segments=cut_segments)

    def visible(self, key_length: int) -> Tensor | None:
        """Bool (B, 1, L or 1, key_length), or None when nothing is restricted."""
        parts: list[Tensor] = []
        if self.key_valid is not None:
            parts.append(self.key_valid[:, None, None, :])
        if self.query_segments is not None and self.key_segments is not None:
            parts.append(self.query_segments[:, None, :, None] == self.key_segments[:, None, None, :])
        if self.last_key is not None:
            columns = torch.arange(key_length, device=self.last_key.device)
            parts.append(columns <= self.last_key[:, None, :, None])
        if not parts:
            return None
        everything = parts[0]
        for part in parts[1:]:
            everything = everything & part
        return everything


def sliced_attention(q: Tensor, k: Tensor, v: Tensor, keys: KeySet, *, aligned: bool = False) -> Tensor:
    """`softmax_attention` by the fused operator, in slices of queries, so that no L x S mask ever exists.

    The mask of a slice is made again in the backward pass instead of being kept. Shapes as in `softmax_attention`.
    `aligned` promises that query i sees no key after i + (S - L), which halves the work of causal attention.
    """
    length, key_length = q.shape[2], k.shape[2]
    if keys.query_segments is None and keys.last_key is None:  # one row of mask serves all queries
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keys.visible(key_length))
    rows = max(1, min(length, MASK_ELEMENTS // max(1, q.shape[0] * key_length)))
    slices = []
    for start in range(0, max(length, 1), rows):
        stop = min(start + rows, length)
        needed = stop + key_length - length if aligned else key_length
        query_rows, seen = q[:, :, start:stop], keys.rows(start, stop).first_keys(needed)
        part = checkpoint(
            _attend, query_rows, k[:, :, :needed], v[:, :, :needed], seen, use_reentrant=False, preserve_rng_state=False
        )
        slices.append(part)
    return slices[0] if len(slices) == 1 else torch.cat(slices, dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor, keys: KeySet) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keys.visible(k.shape[2]))
