"""From the stream to a distribution over the vocabulary, and the loss of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from subquad.models.configuration import SubquadConfig
from subquad.models.pretrained import SubquadPreTrainedModel

IGNORED = -100
"""The label of a token that is not to be predicted, as everywhere in Hugging Face."""


class LanguageHead(nn.Module):
    """Logits of a linear layer, whose weights are the token vectors where the config ties them.

    Tied, the stream is divided by √D, since the token vectors have variance 1. This is the model of Vaswani et al.
    (arXiv 1706.03762, 3.4), written with vectors √D times as large: it multiplies them by √D on the way in instead.
    """

    def __init__(self, config: SubquadConfig) -> None:
        super().__init__()
        self.project = nn.Linear(config.hidden_size, config.vocab_size)
        self.scale = config.hidden_size**-0.5 if config.tie_word_embeddings else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, vocab_size)."""
        return self.project(x * self.scale)


def token_loss(
    model: SubquadPreTrainedModel, logits: Tensor, labels: Tensor, aux_loss: Tensor | None, **kwargs: Any
) -> Tensor:
    """The loss function of the model's class on logits (B, L, V) and labels (B, L), and the auxiliary loss.

    Args:
        model: its `loss_function` counts, so that a user can replace it.
        logits: of all tokens.
        labels: a token or -100 for each.
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
    vocab_size = logits.shape[-1]
    outside = (labels != IGNORED) & ((labels < 0) | (labels >= vocab_size))
    if not labels.is_meta and bool(outside.any()):
        found, last = int(labels[outside][0]), vocab_size - 1
        raise ValueError(f"labels must be {IGNORED} or lie in 0..{last} (vocab_size={vocab_size}), got {found}")
    loss = model.loss_function(logits=logits, labels=labels.contiguous(), vocab_size=vocab_size, **kwargs)
    return loss if aux_loss is None else loss + aux_loss


def kept(x: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The tokens of x (B, L, D) whose logits are wanted: the last ones, 0 for all, or those of the given indices."""
    if isinstance(logits_to_keep, Tensor):
        return x[:, logits_to_keep]
    return x if logits_to_keep == 0 else x[:, -logits_to_keep:]


def tied_head(config: SubquadConfig, head: str, *tables: str) -> dict[str, str]:
    """Parameters tied to the first of the `tables`: the other ones, and the head's where the config ties it."""
    first, *others = (f"{table}.weight" for table in tables)
    heads = [f"{head}.weight"] if config.tie_word_embeddings else []
    return dict.fromkeys([*others, *heads], first)
