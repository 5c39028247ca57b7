"""The base of all models: initialisation, loading and saving."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from subquad.config import nearest
from subquad.interface import ChannelMixer, TokenMixer
from subquad.labels import IGNORED
from subquad.models.axial import AxialPositions
from subquad.models.configuration import SubquadConfig
from subquad.models.embedding import Embedding

_HONOURED = frozenset({"num_items_in_batch", "return_dict"})
"""What transformers 5 passes to every model beside the inputs: `Trainer` the first, `generate` the second."""

_FOREIGN = {
    "position_ids": "positions follow from attention_mask and segment_ids; for packed documents pass segment_ids",
    "token_type_ids": "there are no token types; ask the tokenizer for return_token_type_ids=False",
    "output_attentions": "these mixers have no attention matrices to return",
    "output_hidden_states": "two sequences have no common stream; ask the stack that reads each, `model`",
}
"""Inputs of other models that this one can't honour, unless they are None or False; and what to do without them."""


class SubquadPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving, shared by all models."""

    config_class = SubquadConfig
    config: SubquadConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - transformers declares it without ClassVar

    def __init__(self, config: SubquadConfig) -> None:
        super().__init__(config)
        self.supports_gradient_checkpointing = config.residual == "standard"  # the other computes again by itself

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Names of tied parameters and of those they are tied to.

        What layers share stays shared whether or not the word embeddings are tied, so the names are taken as they
        stand; each model names the head's weight where its config ties it.
        """
        return super().get_expanded_tied_weights_keys(True) if all_submodels else dict(self._tied_weights_keys or {})

    def refuse_foreign(self, given: Mapping[str, Any]) -> None:
        """Refuse every keyword that this model can't honour: none is swallowed in silence.

        Raises:
            ValueError: naming the input and what to do, or the nearest input there is.
        """
        owner = type(self).__name__
        for name, value in given.items():
            if name in _FOREIGN:
                if value is not None and value is not False:
                    raise ValueError(f"{owner}: {name} is not supported; {_FOREIGN[name]}")
            elif name not in _HONOURED:
                known = {*inspect.signature(type(self).forward).parameters, *_HONOURED} - {"self", "kwargs"}
                raise ValueError(f"{owner}: unknown input {name!r}; {nearest(name, known)}")
        if given.get("return_dict") is False:
            raise ValueError(f"{owner}: return_dict=False is not supported; call the output's .to_tuple()")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, TokenMixer | ChannelMixer | Embedding | AxialPositions):
            module.initialise()


def add_aux_loss(
    loss: Tensor, aux_loss: Tensor | None, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **_: Any
) -> Tensor:
    """The sum of both losses, where `labels` are those that the first is of.

    Where a batch is a part of a larger one (gradient accumulation), whose labels number `num_items_in_batch`, its
    auxiliary loss counts as its labels do, so that all parts together weigh it once.
    """
    if aux_loss is None:
        return loss
    if num_items_in_batch is None:
        return loss + aux_loss
    return loss + aux_loss * ((labels != IGNORED).sum() / num_items_in_batch)
