"""From the stream to a distribution over the vocabulary, and the loss of it: what all language models share."""

from __future__ import annotations

from abc import ABC
from typing import Any

from torch import Tensor, nn

from subquad.labels import IGNORED
from subquad.models.configuration import SubquadConfig
from subquad.models.pretrained import SubquadPreTrainedModel, add_aux_loss
from subquad.projection import Projection


class LanguageHead(nn.Module):
    """Logits of a linear layer, whose weights are the token vectors where the config ties them.

    Tied, the stream is divided by √D, since the token vectors have variance 1. This is the model of Vaswani et al.
    (arXiv 1706.03762, 3.4), written with vectors √D times as large: it multiplies them by √D on the way in instead.
    """

    def __init__(self, config: SubquadConfig) -> None:
        super().__init__()
        self.project: nn.Linear = Projection(config.hidden_size, config.vocab_size)
        self.scale = config.hidden_size**-0.5 if config.tie_word_embeddings else 1.0

    def forward(self, x: Tensor, logits_to_keep: int | Tensor = 0) -> Tensor:
        """Logits (B, K, vocab_size) of x (B, L, D).

        Args:
            x: the stream.
            logits_to_keep: K, the last tokens; 0 for all; or the indices of K tokens.
        """
        if isinstance(logits_to_keep, Tensor):
            x = x[:, logits_to_keep]
        elif logits_to_keep:
            x = x[:, -logits_to_keep:]
        return self.project(x * self.scale)


class SubquadLanguageModel(SubquadPreTrainedModel, ABC):
    """A model that ends in a language head."""

    lm_head: LanguageHead

    def get_output_embeddings(self) -> nn.Module:
        """The linear layer of the head."""
        return self.lm_head.project

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the linear layer of the head."""
        assert isinstance(new_embeddings, nn.Linear)
        self.lm_head.project = new_embeddings

    def tie_to(self, *tables: str) -> None:
        """Tie token tables to the first of them and, where the config says so, the weights of the head too."""
        first, *others = (f"{table}.weight" for table in tables)
        heads = ["lm_head.project.weight"] if self.config.tie_word_embeddings else []
        self._tied_weights_keys = dict.fromkeys([*others, *heads], first)

    def token_loss(self, logits: Tensor, labels: Tensor, aux_loss: Tensor | None, **kwargs: Any) -> Tensor:
        """The loss function of the class, and the auxiliary loss.

        Args:
            logits: (B, L, V), of all tokens.
            labels: int (B, L), a token or -100 for each.
            aux_loss: to be added.
            **kwargs: what trainers pass to the loss, such as `num_items_in_batch`.

        Raises:
            ValueError: labels of another shape or outside the vocabulary.
        """
        if labels.shape != logits.shape[:2]:
            raise ValueError(
                f"labels must have a token or {IGNORED} for each of the logits, shape {tuple(logits.shape[:2])}, got "
                f"{tuple(labels.shape)}; with labels use logits_to_keep=0"
            )
        last = logits.shape[-1] - 1
        outside = (labels != IGNORED) & ((labels < 0) | (labels > last))
        if not labels.is_meta and bool(outside.any()):
            found = int(labels[outside][0])
            raise ValueError(f"labels must be {IGNORED} or lie in 0..{last} (vocab_size={last + 1}), got {found}")
        loss = self.loss_function(logits=logits, labels=labels.contiguous(), vocab_size=last + 1, **kwargs)
        return add_aux_loss(loss, aux_loss, labels, **kwargs)
