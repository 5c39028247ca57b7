"""`SubquadForCausalLM`: the causal stack with a language head; generates text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from subquad.models.backbone import SubquadModel
from subquad.models.block import Block, layers_of
from subquad.models.configuration import SubquadConfig
from subquad.models.generation import SubquadGeneratingModel
from subquad.models.language_head import LanguageHead


@dataclass
class SubquadCausalLMOutput(CausalLMOutputWithPast):
    """`loss` (the auxiliary loss included), `logits` (B, L, V), `past_key_values` (a `SubquadCache`), `aux_loss`.

    In training with `loss_chunk` a loss comes without logits.
    """

    aux_loss: Tensor | None = None


class SubquadForCausalLM(SubquadGeneratingModel):
    """The next token from all before it. The model is causal whatever `config.causal` says.

    Raises:
        ValueError: a mixer that has no causal form; the message lists those that have.
    """

    def __init__(self, config: SubquadConfig) -> None:
        super().__init__(config.with_changes(causal=True))
        self.model = SubquadModel(self.config, add_pooling=False)
        self.lm_head = LanguageHead(self.config)
        self.tie_to("model.embedding.tokens")
        self.decide_on_cache()
        self.post_init()

    def decoding_blocks(self) -> Sequence[Block]:
        """All layers."""
        return layers_of(self.model.blocks)

    def predicted(self, labels: Tensor) -> Tensor:
        """As in `SubquadLanguageModel`: all but the first, before which nothing stands."""
        return labels[:, 1:]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> SubquadCausalLMOutput:
        """Logits of the next tokens.

        Args:
            input_ids: int (B, L); or inputs_embeds.
            attention_mask: (B, L), 1 or True for real tokens; with a cache also (B, past + L), for all tokens so far.
            segment_ids: int (B, L), non-decreasing; packed documents don't mix.
            global_attention_mask: (B, L), 1 or True for global tokens.
            inputs_embeds: (B, L, D) instead of input_ids.
            labels: int (B, L), aligned with input_ids (they are shifted here); -100 where nothing is to be predicted,
                as for padding and for the first token of a packed document.
            past_key_values: a `SubquadCache` to go on from; left as it is.
            use_cache: return a cache; None for whether one is given.
            output_hidden_states: return the stream between blocks.
            logits_to_keep: logits of that many last tokens, 0 for all, or indices of tokens.
            **kwargs: what `Trainer` and `generate` add, such as `num_items_in_batch` for the loss; others are refused.

        Raises:
            ValueError: as `SubquadModel`; labels of another shape or outside the vocabulary.
        """
        self.refuse_foreign(kwargs)
        output = self.model(
            input_ids,
            attention_mask,
            segment_ids,
            global_attention_mask,
            inputs_embeds,
            output_hidden_states=output_hidden_states,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        logits, loss = self.predict(output.last_hidden_state, labels, output.aux_loss, logits_to_keep, **kwargs)
        return SubquadCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            aux_loss=output.aux_loss,
        )
