"""Keywords that a config of transformers may be given beside its own fields, and the refusal of all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from subquad.config import field_names, nearest

_OF_TRANSFORMERS = (
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
)
"""What transformers reads of every config, or writes into it, beside its declared fields and its private names."""


def refuse_unknown(config_class: type[PreTrainedConfig], given: Mapping[str, Any], *, saved: bool) -> None:
    """Refuse keywords that nothing reads, except in a saved config, where other tools keep notes of their own.

    Raises:
        ValueError: naming the keyword and the nearest field.
    """
    if saved or not given:
        return
    foreign = {*_OF_TRANSFORMERS, *GenerationConfig().to_dict()}
    for name in given:
        if name not in foreign and not name.startswith("_"):
            known = {*field_names(config_class), "num_labels"} - {*field_names(PreTrainedConfig)}
            raise ValueError(f"SubquadConfig: unknown keyword {name!r}; {nearest(name, known)}")
