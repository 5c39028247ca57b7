"""Where the models meet Hugging Face's `generate`: everything in it that is private or young.

A model whose mixers all have a state decodes from a cache. One with a mixer that has none computes the whole prefix
again for every token and leaves a receipt; asked for a cache in so many words, it refuses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from subquad.models.block import Block
from subquad.models.cache import SubquadCache, check_cacheable
from subquad.models.language_head import SubquadLanguageModel
from subquad.receipt import leave_receipt


class SubquadGeneratingModel(SubquadLanguageModel, GenerationMixin, ABC):
    """A language model with `generate`, from a `SubquadCache`."""

    _is_stateful = True  # a state can't be rolled back, which rules out assisted decoding

    @abstractmethod
    def decoding_blocks(self) -> Sequence[Block]:
        """The causal layers."""

    def decide_on_cache(self) -> None:
        """Let `generate` do without a cache, unless it is asked for, where a mixer has no state."""
        if self._stateless():
            self.generation_config.use_cache = False

    def _stateless(self) -> list[str]:
        mixers = [block.mixer.config for block in self.decoding_blocks()]
        return sorted({mixer.name for mixer in mixers if not mixer.traits.state})

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No cache of keys and values."""
        return False

    def _maybe_prepare_encoder_kwargs_for_generation(
        self,
        inputs_tensor: Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: Any,
    ) -> dict[str, Any]:
        """Run the encoder without the labels, which `Seq2SeqTrainer` passes to `generate` and no encoder can honour."""
        encoder_facts = {name: value for name, value in model_kwargs.items() if name != "labels"}
        return super()._maybe_prepare_encoder_kwargs_for_generation(  # pyright: ignore[reportAttributeAccessIssue] - its self is typed as a protocol
            inputs_tensor, encoder_facts, model_input_name, generation_config
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Put an empty cache into `model_kwargs` where none is given and one can be kept.

        Raises:
            ValueError: another kind of cache, or mixers that can't keep one.
        """
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} chooses a cache of keys and values, "
                "but these models keep the states of their mixers; leave it out"
            )
        if generation_config.use_cache is False:
            if self._stateless():
                leave_receipt(
                    type(self).__name__,
                    asked="generate",
                    ran="the whole prefix again for every token",
                    reason=f"mixers without a state: {', '.join(self._stateless())}",
                )
        elif model_kwargs.get("past_key_values") is None:
            check_cacheable(self.decoding_blocks(), prepended=0)
            model_kwargs["past_key_values"] = SubquadCache()
