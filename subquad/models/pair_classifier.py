"""`SubquadForPairClassification`: two sequences through one stack, and a label for the pair.

The Retrieval task of Long Range Arena (arXiv 2011.04006, 2.2 and A.1.3): neither tower sees the other's tokens.

    u, v = pool(stack(a)), pool(stack(b))        logits = Linear ReLU Linear ReLU Linear ([u, v, u * v, u - v])

Departures: the paper describes these features, of which the official code has a version (its `interaction="NLI"`),
while its released configs leave them out and read [u, v] alone: `pair_features="concat"`. The head is the code's, whose
second hidden layer is half as wide as the first. Its encoder pools at the first token: `pooling="first"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from subquad.layers.projection import Projection
from subquad.models.backbone import SubquadModel
from subquad.models.configuration import SubquadConfig
from subquad.models.pretrained import SubquadPreTrainedModel, add_aux_loss


@dataclass
class SubquadPairClassifierOutput(SequenceClassifierOutput):
    """Output of the classifier of pairs.

    Attributes:
        loss: cross-entropy and auxiliary loss, if labels were given.
        logits: (B, num_labels).
        aux_loss: mean over both sequences of the layers' auxiliary losses, or None.
    """

    aux_loss: Tensor | None = None


class PairHead(nn.Module):
    """Two hidden layers with ReLU on the features of a pair."""

    def __init__(self, config: SubquadConfig) -> None:
        super().__init__()
        self.interaction = config.pair_features == "interaction"
        if config.num_labels is None:
            raise ValueError("SubquadConfig: num_labels is needed for classification")
        wide, narrow = config.intermediate_size, max(1, config.intermediate_size // 2)
        self.expand = Projection((4 if self.interaction else 2) * config.output_width, wide)
        self.narrow = Projection(wide, narrow)
        self.classify = Projection(narrow, config.num_labels)
        self.activation = nn.ReLU()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two (B, D) to (B, num_labels)."""
        further = (first * second, first - second) if self.interaction else ()
        hidden = self.activation(self.expand(torch.cat((first, second, *further), dim=-1)))
        return self.classify(self.activation(self.narrow(hidden)))


class SubquadForPairClassification(SubquadPreTrainedModel):
    """One label for two sequences, from the vectors that `config.pooling` chooses."""

    def __init__(self, config: SubquadConfig) -> None:
        super().__init__(config)
        self.model = SubquadModel(config)
        self.head = PairHead(config)
        self.loss_type = "ForSequenceClassification"
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pair_input_ids: Tensor | None = None,
        pair_attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        pair_global_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pair_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        pair_segment_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> SubquadPairClassifierOutput:
        """Classify.

        Args:
            input_ids: int (B, L), the first sequence; or inputs_embeds.
            attention_mask: (B, L), 1 or True for real tokens.
            pair_input_ids: int (B, S), the second sequence; or pair_inputs_embeds.
            pair_attention_mask: (B, S), likewise.
            global_attention_mask: (B, L), 1 or True for global tokens of the first.
            pair_global_attention_mask: (B, S), likewise of the second.
            inputs_embeds: (B, L, D) instead of input_ids.
            pair_inputs_embeds: (B, S, D) instead of pair_input_ids.
            labels: int (B,) for the cross-entropy loss.
            segment_ids: int (B, L), non-decreasing; packed documents of the first don't mix.
            pair_segment_ids: int (B, S), likewise of the second.
            **kwargs: what `Trainer` and `generate` add, such as `num_items_in_batch` for the loss; others are refused.
        """
        self.refuse_foreign(kwargs)
        first = self.model(input_ids, attention_mask, segment_ids, global_attention_mask, inputs_embeds)
        pair = (pair_input_ids, pair_attention_mask, pair_segment_ids, pair_global_attention_mask, pair_inputs_embeds)
        second = self.model(*pair)
        logits = self.head(first.pooler_output, second.pooler_output)
        aux_loss = None if first.aux_loss is None else (first.aux_loss + second.aux_loss) / 2
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            loss = add_aux_loss(loss, aux_loss, labels, **kwargs)
        return SubquadPairClassifierOutput(loss=loss, logits=logits, aux_loss=aux_loss)
