"""N-gram: softmax attention over the last few tokens, as an N-gram language model looks back.

Chelba et al. 2020, "Faster Transformer Decoding: N-gram Masked Self-Attention", arXiv:2001.04589.

    o_i = softmax over 0 <= i - j <= N - 2 of q_i · k_j / √E

Cost O(L N D); state: the last N - 2 keys and values. An N-gram predicts a token from the N - 1 before it, and a
position holds the token before the one that it predicts: N - 1 keys, itself included. N = 2 sees itself alone, N = 1
nothing (o = 0). After n layers a token reaches n (N - 2) tokens back, so that only one layer, or N <= 2, makes a true
N-gram model.

Departures: `n` is the paper's N, one more than the keys, whereas `mask_ngram_order` of the official code counts the
keys. The paper changes the decoder's self-attention alone, so there is no bidirectional and no cross form. Distances
count valid tokens: an invalid token takes no position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from subquad.costs import Cost, visible_pairs
from subquad.interface import Dims, MixerConfig, Traits
from subquad.layers.heads import BY_HEADS, HeadMixer, Heads, attention_cost, projection_cost
from subquad.mask import Mask, continue_segments
from subquad.ops.packing import Packing, take
from subquad.ops.pattern.attention import pattern_attention
from subquad.patterns.bands import Ngram as NgramPattern
from subquad.registry import register
from subquad.state import State, state_dataclass


@register("ngram")
@dataclass(frozen=True, kw_only=True)
class NgramConfig(MixerConfig):
    """Options of N-gram attention."""

    family: ClassVar[str] = "sparse"

    n: int = 8
    """The paper's N: a token sees the n - 1 that end with itself. The paper finds 4 to 8 enough for translation."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.n < 1:
            raise ValueError(f"ngram: n must be at least 1, a token sees n - 1 keys, itself included; got {self.n}")

    @property
    def earlier(self) -> int:
        """Keys before its own that a token sees."""
        return max(0, self.n - 2)

    @property
    def traits(self) -> Traits:
        """Causal alone: an N-gram looks back."""
        return Traits(causal=True, padding=True, segments=True, state=True, constant_state=True)

    def build(self, dims: Dims) -> Ngram:
        """The module."""
        return Ngram(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections and the visible pairs."""
        pairs = 0 if self.n == 1 else visible_pairs(length, left=self.earlier, right=0)
        state = Cost(state_bytes=2 * self.earlier * dims.inner_dim * max(4, dtype_bytes))
        return projection_cost(dims, length, dtype_bytes) + attention_cost(dims, length, pairs, dtype_bytes) + state


@state_dataclass
class NgramState(State):
    """The last N - 2 valid tokens, the newest in the last column; columns older than the stream are zeros.

    Attributes:
        length: int64 (B,).
        keys: (B, H, N - 2, E).
        values: (B, H, N - 2, E).
        segments: int64 (B, N - 2).
    """

    keys: Tensor
    values: Tensor
    segments: Tensor


class Ngram(HeadMixer):
    """Attention to the last N - 1 tokens."""

    parting = BY_HEADS
    config: NgramConfig

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> NgramState:
        """Nothing seen yet."""
        columns = self.config.earlier
        keys = torch.zeros(batch_size, self.dims.num_heads, columns, self.dims.head_dim, device=device, dtype=dtype)
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        segments = torch.zeros(batch_size, columns, dtype=torch.int64, device=device)
        return NgramState(length, keys, keys.clone(), segments)

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Attend to the last tokens; padding is taken out first, so that it takes no position."""
        packing = Packing(heads.mask.valid)
        q, k, v = (packing.pack(tensor) for tensor in (heads.q, *heads.keys_and_values()))
        mask = packing.pack_mask(Mask(heads.mask.valid, heads.mask.segments))
        if isinstance(state, NgramState):
            out, after = self._continue(q, k, v, mask, state)
        else:
            out, after = self._look_back(q, k, v, mask), None
        return packing.unpack(out), after

    def _look_back(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        key_valid: Tensor | None = None,
        key_segments: Tensor | None = None,
    ) -> Tensor:
        """Attend; keys beyond as many as there are queries precede them."""
        if self.config.n == 1:  # a token sees nothing, which no pattern says
            key_valid = torch.zeros(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
        return pattern_attention(
            q,
            k,
            v,
            NgramPattern(max(2, self.config.n)),
            mask=mask,
            key_valid=key_valid,
            key_segments=key_segments,
            query_offset=k.shape[2] - q.shape[2],
        )

    def _continue(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, before: NgramState) -> tuple[Tensor, NgramState]:
        """Attend to the stored tokens too, and store the newest."""
        earlier, length = self.config.earlier, before.length
        last, seen = (before.segments[:, -1], length) if earlier else (torch.zeros_like(length),) * 2
        segments = continue_segments("ngram", last, seen, mask, q.shape[2])
        valid = torch.ones_like(segments, dtype=torch.bool) if mask.valid is None else mask.valid
        k, v = (torch.cat((old.to(q.dtype), new), dim=2) for old, new in ((before.keys, k), (before.values, v)))
        known = torch.arange(earlier, device=q.device) >= earlier - length[:, None]
        key_valid = torch.cat((known, valid), dim=1)
        key_segments = torch.cat((before.segments, segments), dim=1)
        out = self._look_back(q, k, v, Mask(mask.valid, segments), key_valid, key_segments)
        return out, _next_state(before, k, v, key_segments, valid.sum(dim=1))


def _next_state(before: NgramState, k: Tensor, v: Tensor, segments: Tensor, added: Tensor) -> NgramState:
    """The columns that end with the newest valid token; `added` (B,) of this call's tokens, the first, are valid."""
    columns = torch.arange(before.keys.shape[2], device=k.device) + added[:, None]
    keys, values = (take(tensor, columns).to(before.keys.dtype) for tensor in (k, v))
    return NgramState(before.length + added, keys, values, take(segments, columns))
