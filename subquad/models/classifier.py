"""`SubquadForSequenceClassification`: the stack with a classification head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from subquad.layers.projection import Projection
from subquad.models.backbone import SubquadModel
from subquad.models.configuration import SubquadConfig
from subquad.models.pretrained import SubquadPreTrainedModel, add_aux_loss


@dataclass
class SubquadClassifierOutput(SequenceClassifierOutput):
    """Output of the classifier: `loss` (the auxiliary loss included), `logits` (B, num_labels), `aux_loss`."""

    aux_loss: Tensor | None = None


class ClassificationHead(nn.Module):
    """Linear, ReLU, Linear: the head of Long Range Arena."""

    def __init__(self, config: SubquadConfig) -> None:
        super().__init__()
        self.expand = Projection(config.output_width, config.intermediate_size)
        self.activation = nn.ReLU()
        if config.num_labels is None:
            raise ValueError("SubquadConfig: num_labels is needed for classification")
        self.classify = Projection(config.intermediate_size, config.num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, D) -> (B, num_labels)."""
        return self.classify(self.activation(self.expand(pooled)))


class SubquadForSequenceClassification(SubquadPreTrainedModel):
    """One label for a sequence, from the vector that `config.pooling` chooses."""

    def __init__(self, config: SubquadConfig) -> None:
        super().__init__(config)
        self.model = SubquadModel(config)
        self.head = ClassificationHead(config)
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
    ) -> SubquadClassifierOutput:
        """Classify.

        Args:
            input_ids: int (B, L); or inputs_embeds.
            attention_mask: (B, L), 1 or True for real tokens.
            segment_ids: int (B, L), non-decreasing.
            global_attention_mask: (B, L), 1 or True for global tokens.
            inputs_embeds: (B, L, D) instead of input_ids.
            labels: int (B,) for the cross-entropy loss.
            output_hidden_states: return the stream between blocks.
            **kwargs: what `Trainer` and `generate` add, such as `num_items_in_batch` for the loss; others are refused.
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
        logits = self.head(output.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            loss = add_aux_loss(loss, output.aux_loss, labels, **kwargs)
        return SubquadClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, aux_loss=output.aux_loss
        )
