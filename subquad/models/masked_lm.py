"""`SubquadForMaskedLM`: the bidirectional stack with a language head; fills in hidden tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import MaskedLMOutput

from subquad.models.backbone import SubquadModel
from subquad.models.configuration import SubquadConfig
from subquad.models.language_head import LanguageHead, SubquadLanguageModel


@dataclass
class SubquadMaskedLMOutput(MaskedLMOutput):
    """`loss` (the auxiliary loss included), `logits` (B, L, V) or, in training with `loss_chunk`, None, `aux_loss`."""

    aux_loss: Tensor | None = None


class SubquadForMaskedLM(SubquadLanguageModel):
    """Hidden tokens from those on both sides.

    Raises:
        ValueError: a causal config, or a mixer that has a causal form alone.
    """

    def __init__(self, config: SubquadConfig) -> None:
        if config.causal:
            raise ValueError(
                "SubquadForMaskedLM: reads both sides of a hidden token, so causal=True has no meaning here; use "
                "causal=False, or SubquadForCausalLM"
            )
        super().__init__(config)
        self.model = SubquadModel(config, add_pooling=False)
        self.lm_head = LanguageHead(config)
        self.tie_to("model.embedding.tokens")
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SubquadMaskedLMOutput:
        """Logits of the tokens in their own places.

        Args:
            input_ids: int (B, L), some of them hidden behind the mask token; or inputs_embeds.
            attention_mask: (B, L), 1 or True for real tokens.
            segment_ids: int (B, L), non-decreasing; packed documents don't mix.
            global_attention_mask: (B, L), 1 or True for global tokens.
            inputs_embeds: (B, L, D) instead of input_ids.
            labels: int (B, L), the true tokens in their own places; -100 where nothing is to be predicted.
            output_hidden_states: return the stream between blocks.
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
        )
        logits, loss = self.predict(output.last_hidden_state, labels, output.aux_loss, **kwargs)
        return SubquadMaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            aux_loss=output.aux_loss,
        )
