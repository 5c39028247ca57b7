"""Where the models meet Hugging Face's `generate`: everything in it that is private or young.

A model whose mixers all have a state decodes from a cache. One with a mixer that has none computes the whole prefix
again for every token and leaves a receipt; asked for a cache in so many words, it refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import GenerationMixin

from subquad.models.block import Block
from subquad.models.cache import SubquadCache, check_cacheable
from subquad.receipt import leave_receipt


class StateGenerationMixin(GenerationMixin):
    """Generation from a `SubquadCache`; models mix it in and say which blocks decode."""

    _is_stateful = True  # a state can't be rolled back, which rules out assisted decoding

    def decoding_blocks(self) -> Sequence[Block]:
        """The causal layers."""
        raise NotImplementedError

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No cache of keys and values."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Put an empty cache into `model_kwargs` where none is given and one can be kept."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} chooses a cache of keys and values, "
                "but these models keep the states of their mixers; leave it out"
            )
        without = stateless(self.decoding_blocks())
        if generation_config.use_cache is False and without:
            leave_receipt(
                type(self).__name__,
                asked="generate",
                ran="the whole prefix again for every token",
                reason=f"{', '.join(without)} has no state",
            )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            check_cacheable(self.decoding_blocks(), prepended=0)
            model_kwargs["past_key_values"] = SubquadCache()


def stateless(blocks: Sequence[Block]) -> list[str]:
    """Names of the mixers without a state."""
    return sorted({block.mixer.config.name for block in blocks if not block.mixer.config.traits.state})
