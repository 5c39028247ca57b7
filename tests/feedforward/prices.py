"""Holding the price of a channel mixer against what the counters count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from subquad.build import build_feedforward, feedforward_config


def assert_price_is_counted(
    name: str, options: dict[str, Any], *, length: int = 9, dtype: torch.dtype = torch.float32
) -> None:
    """FLOPs, parameters and the numbers that autograd keeps in training, of one sequence."""
    module = build_feedforward(name, embed_dim=6, **options).to(dtype).train()
    x = torch.randn(1, length, 6, dtype=dtype, requires_grad=True)
    price = feedforward_config(name, **options).cost(6, length, dtype.itemsize)
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert price.flops == counter.get_total_flops()
    assert price.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert price.activation_bytes == saved_numbers(module, x)


def saved_numbers(module: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that autograd keeps of a call, without parameters and indices."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        mixed = module(x)
    assert mixed.y.requires_grad
    numbers = [tensor for address, tensor in kept.items() if address not in own and tensor.dtype != torch.int64]
    return sum(tensor.untyped_storage().nbytes() for tensor in numbers)
