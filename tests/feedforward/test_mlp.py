"""The position-wise feed-forward network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from subquad.build import build_feedforward, feedforward_config
from subquad.feedforward.mlp import Mlp
from subquad.mask import Mask


def mlp(**options: Any) -> Mlp:
    module = build_feedforward("mlp", embed_dim=6, **options)
    assert isinstance(module, Mlp)
    return module


@pytest.mark.parametrize(("activation", "function"), [("gelu", F.gelu), ("relu", F.relu)])
def test_it_equals_the_formula_token_by_token(activation: str, function: Any) -> None:
    module, x = mlp(activation=activation, hidden_dim=5), torch.randn(2, 3, 6)
    hidden = function(x @ module.expand.weight.T + module.expand.bias)
    expected = hidden @ module.contract.weight.T + module.contract.bias
    y, state, aux_loss = module(x, mask=Mask.from_lengths([3, 1], 3))
    torch.testing.assert_close(y, expected)
    assert state is None
    assert aux_loss is None


def test_the_hidden_layer_is_four_times_as_wide_unless_given() -> None:
    assert mlp().expand.out_features == 24
    assert mlp(hidden_dim=7).expand.out_features == 7


@pytest.mark.parametrize("options", [{}, {"hidden_dim": 5}, {"activation": "relu"}])
def test_the_price_is_what_the_counters_count(options: dict[str, Any]) -> None:
    module, x = mlp(**options), torch.randn(1, 9, 6, requires_grad=True)
    price = feedforward_config("mlp", **options).cost(6, 9, 4)
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert price.flops == counter.get_total_flops()
    assert price.parameters == sum(parameter.numel() for parameter in module.parameters())
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = module(x).y
    assert y.requires_grad
    saved = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    assert price.activation_bytes == saved


def test_dropout_acts_after_the_activation_and_on_the_output_in_training_alone() -> None:
    module, x = mlp(dropout=0.5, hidden_dim=500), torch.randn(4, 8, 6)
    assert torch.equal(module.eval()(x).y, module.eval()(x).y)
    dropped = (module.train()(x).y == 0).float().mean()
    assert 0.3 < float(dropped) < 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": 0}, "mlp: hidden_dim must be at least 1, got 0"),
        ({"dropout": 1.0}, r"mlp: dropout must be in \[0, 1\), got 1.0"),
        ({"activation": "tanh"}, "option 'activation' must be one of 'gelu', 'relu', got 'tanh'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mlp(**options)
