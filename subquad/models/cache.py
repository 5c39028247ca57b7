"""The states of all layers as a Hugging Face cache.

A cache is a holder of values: the states in it are never modified, and a call of a model leaves the cache it was given
as it is and returns a new one. So keeping a reference is enough to go back to a prefix, or to go on from it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from subquad.capability import mixers_with
from subquad.models.block import Block, LayerStates, layers_of
from subquad.state import State


class StateLayer(CacheLayerMixin):
    """One layer's states, and the number of tokens that went into them, padding included."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, states: LayerStates, tokens: int) -> None:
        super().__init__()
        self.states = states
        self.tokens = tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Refused: a mixer's own state takes the place of keys and values.

        Raises:
            NotImplementedError: always.
        """
        raise _not_keys()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused, likewise.

        Raises:
            NotImplementedError: always.
        """
        raise _not_keys()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next `query_length` tokens may see, and the place of the first."""
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens so far, padding included."""
        return self.tokens

    def get_max_length(self) -> int:
        """-1: the mixers themselves refuse what is too long for them."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.states.own.length.shape[0]

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refused: what a state has taken in can't be taken out of it.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "SubquadCache can't be cropped: a mixer's state doesn't keep single tokens; keep the cache of the shorter "
            "prefix, which later calls leave as it is, and go on from that"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row beam_idx[b] was: beam search."""
        self._change(lambda state: state.index_select(beam_idx.to(state.length.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        rows = torch.arange(self.batch_size).repeat_interleave(repeats)
        self.reorder_cache(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these indices."""
        self.reorder_cache(indices)

    def _change(self, change: Callable[[State], State]) -> None:
        own, cross = self.states
        self.states = LayerStates(change(own), None if cross is None else change(cross))


class SubquadCache(Cache):
    """What a causal model carries from call to call; `SubquadCache()` is empty.

    Pass it as `past_key_values`, and go on with the one that is returned.
    """

    def __init__(self, states: Sequence[LayerStates] = (), tokens: int = 0) -> None:
        super().__init__(layers=[StateLayer(of_layer, tokens) for of_layer in states])

    @property
    def states(self) -> list[LayerStates]:
        """Of every layer; none while the cache is empty."""
        return [layer.states for layer in self._state_layers]

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(state.nbytes for layer in self.states for state in layer if state is not None)

    def detach(self) -> SubquadCache:
        """The same, cut off from the graph that made it: truncated backpropagation."""
        detached = [LayerStates(own.detach(), None if cross is None else cross.detach()) for own, cross in self.states]
        return SubquadCache(detached, self.get_seq_length())

    def reset(self) -> None:
        """Make it empty."""
        self.layers.clear()

    @property
    def _state_layers(self) -> list[StateLayer]:
        return [layer for layer in self.layers if isinstance(layer, StateLayer)]


def open_states(blocks: nn.ModuleList, cache: object | None, batch_size: int, *, prepended: int) -> list[LayerStates]:
    """The states of all blocks, of a cache or, where that is None or empty, such as have seen nothing.

    Raises:
        ValueError: blocks without a state, vectors prepended to every call, or the cache of another model or batch.
    """
    layers = layers_of(blocks)
    check_cacheable(layers, prepended=prepended)
    if cache is not None and not isinstance(cache, SubquadCache):
        raise ValueError(
            f"past_key_values must be a SubquadCache, got {type(cache).__name__}; begin with SubquadCache() or with "
            "use_cache=True alone, and go on with what the model returns"
        )
    if cache is None or not cache.states:
        return [layer.init_states(batch_size) for layer in layers]
    if len(cache.states) != len(layers):
        raise ValueError(
            f"past_key_values holds the states of {len(cache.states)} layers but this model has {len(layers)}; it "
            "comes from another model"
        )
    if cache.batch_size != batch_size:
        raise ValueError(
            f"past_key_values holds {cache.batch_size} rows but the input has {batch_size}; choose rows with "
            "batch_select_indices, or repeat them with batch_repeat_interleave"
        )
    return cache.states


def check_cacheable(blocks: Sequence[Block], *, prepended: int) -> None:
    """Refuse a cache where the blocks can't have one.

    Raises:
        ValueError: mixers that are bidirectional or without a state, or vectors prepended to every call.
    """
    mixers = [block.mixer for block in blocks]
    if not all(mixer.dims.causal for mixer in mixers):
        raise ValueError("use_cache and past_key_values need causal=True; this model's mixers see both sides")
    if prepended:
        raise ValueError(
            "use_cache and past_key_values don't go with vectors that the model prepends to every call (pooling='cls', "
            "a global stream); use add_pooling=False or another pooling"
        )
    without = sorted({mixer.config.name for mixer in mixers if not mixer.config.traits.state})
    if without:
        able = ", ".join(sorted({*mixers_with("state")} & {*mixers_with("causal")}))
        raise ValueError(
            f"use_cache and past_key_values need mixers with a state; without one: {', '.join(without)}. Pass "
            f"use_cache=False, which computes the whole prefix again for every token, or use one of: {able}"
        )


def _not_keys() -> NotImplementedError:
    return NotImplementedError("SubquadCache holds the states of mixers, which a model replaces as a whole")
