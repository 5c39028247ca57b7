"""From the stream to a distribution over the vocabulary, and the loss of it: what all language models share."""

from __future__ import annotations

from abc import ABC
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subquad.labels import IGNORED
from subquad.layers.projection import Projection
from subquad.models.configuration import SubquadConfig
from subquad.models.pretrained import SubquadPreTrainedModel, add_aux_loss


class LanguageHead(nn.Module):
    """Logits of a linear layer, whose weights are the token vectors where the config ties them.

    Tied, the stream is divided by √D, since the token vectors have variance 1. This is the model of Vaswani et al.
    (arXiv 1706.03762, 3.4), written with vectors √D times as large: it multiplies them by √D on the way in instead.

    Raises:
        ValueError: tied, and the stream at the end is wider than the token vectors.
    """

    def __init__(self, config: SubquadConfig) -> None:
        super().__init__()
        if config.tie_word_embeddings and config.output_width != config.hidden_size:
            raise ValueError(
                f"SubquadConfig: reversible_join={config.reversible_join!r} makes the last hidden state "
                f"{config.output_width} wide, and a head tied to token vectors of hidden_size={config.hidden_size} "
                "can't read it; use tie_word_embeddings=False, or reversible_join='mean' or 'sum'"
            )
        self.project: nn.Linear = Projection(config.output_width, config.vocab_size)
        self.scale = config.hidden_size**-0.5 if config.tie_word_embeddings else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L, vocab_size) of the stream x (B, L, D)."""
        return self.project(x * self.scale)


class Prediction(NamedTuple):
    """What a language model says, and how wrong it is.

    Attributes:
        logits: (B, K, V); None where the loss was computed in chunks.
        loss: 0-dim, the auxiliary loss included; None without labels.
    """

    logits: Tensor | None
    loss: Tensor | None


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

    def predict(
        self, x: Tensor, labels: Tensor | None, aux_loss: Tensor | None, logits_to_keep: int | Tensor = 0, **kwargs: Any
    ) -> Prediction:
        """Logits, and with labels the loss function of the class plus the auxiliary loss.

        Args:
            x: the stream (B, L, D).
            labels: int (B, L), a token or -100 for each; None for logits alone.
            aux_loss: to be added.
            logits_to_keep: K, the last tokens; 0 for all; or the indices of K tokens.
            **kwargs: what trainers pass to the loss, such as `num_items_in_batch`.

        Raises:
            ValueError: labels of another shape or outside the vocabulary.
        """
        x = _kept(x, logits_to_keep)
        if labels is None:
            return Prediction(self.lm_head(x), None)
        _check_labels(labels, x.shape[:2], self.lm_head.project.out_features)
        if self.training and self.config.loss_chunk:
            loss, logits = self._loss_in_chunks(x, labels, **kwargs), None
        else:
            logits = self.lm_head(x)
            loss = self.loss_function(logits=logits, labels=labels.contiguous(), vocab_size=logits.shape[-1], **kwargs)
        return Prediction(logits, add_aux_loss(loss, aux_loss, self.predicted(labels), **kwargs))

    def predicted(self, labels: Tensor) -> Tensor:
        """The labels (B, T) that the loss function compares with logits."""
        return labels

    def _loss_in_chunks(
        self, x: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **kwargs: Any
    ) -> Tensor:
        """The same loss, of which autograd keeps x alone: each chunk's logits are made again in the backward pass."""
        size, labels = self.config.loss_chunk, self.predicted(labels)
        x = x[:, : labels.shape[1]]
        if num_items_in_batch is None:
            num_items_in_batch = (labels != IGNORED).sum()
        loss_of = partial(self._loss_of_chunk, num_items_in_batch=num_items_in_batch, **kwargs)
        parts = zip(x.split(size, dim=1), labels.split(size, dim=1), strict=True)
        losses = [checkpoint(loss_of, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.stack(losses).sum()

    def _loss_of_chunk(self, x: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        """What a chunk adds to the loss; its labels are shifted already where they have to be."""
        logits, labels = self.lm_head(x), labels.contiguous()
        return self.loss_function(
            logits=logits, labels=labels, shift_labels=labels, vocab_size=logits.shape[-1], **kwargs
        )


def _kept(x: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The tokens of x (B, L, D) whose logits are asked for."""
    if isinstance(logits_to_keep, Tensor):
        return x[:, logits_to_keep]
    return x[:, -logits_to_keep:] if logits_to_keep else x


def _check_labels(labels: Tensor, expected: torch.Size, vocab_size: int) -> None:
    if labels.shape != expected:
        raise ValueError(
            f"labels must have a token or {IGNORED} for each of the logits, shape {tuple(expected)}, got "
            f"{tuple(labels.shape)}; with labels use logits_to_keep=0"
        )
    outside = (labels != IGNORED) & ((labels < 0) | (labels >= vocab_size))
    if not labels.is_meta and bool(outside.any()):
        found = int(labels[outside][0])
        raise ValueError(
            f"labels must be {IGNORED} or lie in 0..{vocab_size - 1} (vocab_size={vocab_size}), got {found}"
        )
