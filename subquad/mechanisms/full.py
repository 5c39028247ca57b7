"""Full: dense softmax attention, the baseline that every other mechanism has to beat.

Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, section 3.2.

    y = softmax(q kᵀ / √E) v W_o        causal: keys j <= i

Cost O(L² D) time; memory O(L D) in training too, since no L x L matrix is kept, whatever the mask.

Departures: attention probabilities are never dropped (it would force the L x L matrix); dropout acts on the output.
The state is a cache of keys and values; that of cross-attention holds the projected context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.costs import Cost, visible_pairs
from subquad.interface import Dims, MixerConfig, Traits
from subquad.layers.cache import KeyValueCache, attend_cached, empty_cache, empty_context, read_context
from subquad.layers.heads import BY_HEADS, HeadMixer, Heads, attention_cost, projection_cost
from subquad.mask import Mask
from subquad.ops.pattern.attention import pattern_attention
from subquad.patterns.bands import Causal, Strided
from subquad.registry import register
from subquad.state import State

EVERYTHING = Strided(1)
"""The pattern in which every query sees every key."""


@register("full")
@dataclass(frozen=True, kw_only=True)
class FullConfig(MixerConfig):
    """Dense attention has no options."""

    family: ClassVar[str] = "dense"

    @property
    def traits(self) -> Traits:
        """Everything but global tokens, of which all its tokens are."""
        return Traits(
            bidirectional=True,
            causal=True,
            cross=True,
            padding=True,
            segments=True,
            state=True,
            approximates_softmax=True,
        )

    def build(self, dims: Dims) -> Full:
        """The module."""
        return Full(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections and visible pairs."""
        keys = dims.key_length(length)
        pairs = visible_pairs(length, right=0) if dims.causal else length * keys
        stored = keys if dims.causal or dims.cross else 0
        state = Cost(state_bytes=2 * stored * dims.inner_dim * max(4, dtype_bytes))
        return projection_cost(dims, length, dtype_bytes) + attention_cost(dims, length, pairs, dtype_bytes) + state


class Full(HeadMixer):
    """Dense softmax attention."""

    parting = BY_HEADS

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """An empty cache."""
        make = empty_context if self.dims.cross else empty_cache
        return make(self.dims, batch_size, device, dtype)

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Dispatch to the form that the dims and the state ask for."""
        if self.dims.cross:
            return self._attend_context(heads, state)
        if isinstance(state, KeyValueCache):
            return attend_cached("full", heads, Causal(), state)
        k, v = heads.keys_and_values()
        return _attend_sequence(heads.q, k, v, heads.mask, causal=self.dims.causal), None

    def _attend_context(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        k, v, key_valid, key_segments, after = read_context("full", heads, state)
        if key_segments is None:
            return _attend_everything(heads.q, k, v, key_valid), after
        documents = Mask(segments=heads.mask.segments)
        out = pattern_attention(
            heads.q, k, v, EVERYTHING, mask=documents, key_valid=key_valid, key_segments=key_segments
        )
        return out, after


def _attend_sequence(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, causal: bool) -> Tensor:
    facts = Mask(mask.valid, mask.segments)
    if causal:
        if mask.valid is None and mask.segments is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return pattern_attention(q, k, v, Causal(), mask=facts)
    if mask.segments is None:
        return _attend_everything(q, k, v, mask.valid)
    return pattern_attention(q, k, v, EVERYTHING, mask=facts)


def _attend_everything(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None) -> Tensor:
    """Every query sees every valid key: one row of mask serves them all."""
    visible = None if key_valid is None else key_valid[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
