"""Memory across the windows of a stream: what a model's mixers hold at the end of a step is where the next begins.

Gradients stop at the border of a window (truncated backpropagation, as in Transformer-XL, arXiv 1901.02860, section
3.2), and a row whose document begins starts with nothing. Only mechanisms whose state has a constant size carry it: a
cache of keys and values would make every step dearer than the one before. The others see each window alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from subquad.models.block import LayerStates, layers_of
from subquad.models.cache import SubquadCache
from subquad.models.causal_lm import SubquadForCausalLM
from subquad.models.state_tensors import state_tensors, states_of_tensors
from subquad.state import State

_TOKENS = "tokens"


class StreamMemory:
    """The states of the rows of a batch between two steps.

    Args:
        model: one that `memory_of` gives a memory.
    """

    def __init__(self, model: SubquadForCausalLM) -> None:
        self._layers = layers_of(model.model.blocks)
        self._blocks = model.model.blocks
        self._cache = SubquadCache()

    def before(self, carried: Tensor) -> SubquadCache:
        """What the next step begins with.

        Args:
            carried: bool (B,), rows that go on; the others are emptied.
        """
        states = self._cache.states
        if not states or states[0].own.length.shape[0] != carried.shape[0]:  # the first step
            return SubquadCache([layer.init_states(carried.shape[0]) for layer in self._layers])
        fresh = [layer.init_states(carried.shape[0]) for layer in self._layers]
        kept = [LayerStates(_choose(carried, old.own, new.own), None) for old, new in zip(states, fresh, strict=True)]
        return SubquadCache(kept, self._cache.get_seq_length())

    def after(self, cache: SubquadCache) -> None:
        """Keep what a step ended with."""
        self._cache = cache.detach()

    def tensors(self) -> dict[str, Tensor]:
        """All of it, as safetensors can write it."""
        return {_TOKENS: torch.tensor(self._cache.get_seq_length()), **state_tensors(self._cache.states)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`.

        Raises:
            ValueError: tensors of another model.
        """
        states = dict(tensors)
        tokens = int(states.pop(_TOKENS, torch.tensor(0)))
        self._cache = SubquadCache(states_of_tensors(self._blocks, states), tokens)


def memory_of(model: object) -> StreamMemory | None:
    """An empty memory for a model that can carry one from window to window without end; None for all others."""
    if not isinstance(model, SubquadForCausalLM) or model.model.global_stream:
        return None
    traits = [layer.mixer.config.traits for layer in layers_of(model.model.blocks)]
    carries = all(t.state and t.constant_state and not t.fixed_length for t in traits)
    return StreamMemory(model) if carries else None


def _choose(carried: Tensor, old: State, new: State) -> State:
    """Row by row the old state or the new one, which has the same shape."""
    chosen = {}
    for field in fields(old):
        kept, empty = getattr(old, field.name), getattr(new, field.name)
        rows = carried.view(-1, *[1] * (kept.dim() - 1))
        chosen[field.name] = torch.where(rows, kept, empty.to(kept.dtype))
    return replace(old, **chosen)
