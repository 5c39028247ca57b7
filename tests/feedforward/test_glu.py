"""The gated feed-forward network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prices import assert_price_is_counted

from subquad.build import build_feedforward, feedforward_config
from subquad.feedforward.glu import Glu
from subquad.mask import Mask

FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


def glu(**options: Any) -> Glu:
    module = build_feedforward("glu", embed_dim=6, **options)
    assert isinstance(module, Glu)
    return module


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_it_equals_the_formula_token_by_token(activation: str) -> None:
    module = glu(activation=activation, hidden_dim=5).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    gate, value = (F.linear(x, layer.weight, layer.bias) for layer in (module.gate, module.expand))
    expected = F.linear(FUNCTIONS[activation](gate) * value, module.contract.weight, module.contract.bias)
    y, state, aux_loss = module(x, mask=Mask.from_lengths([3, 1], 3))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert state is None
    assert aux_loss is None
    upstream, leaves = torch.randn_like(y), [x, *module.parameters()]
    found, wanted = (torch.autograd.grad((each * upstream).sum(), leaves) for each in (y, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_it_has_the_weights_of_an_mlp_unless_a_width_is_given() -> None:
    assert glu().expand.out_features == 16
    assert glu(hidden_dim=7).expand.out_features == 7
    matrices = [module.cost(6, 1, 4).flops for module in (feedforward_config("glu"), feedforward_config("mlp"))]
    assert matrices[0] == matrices[1]


def test_tokens_do_not_meet() -> None:
    assert feedforward_config("glu").position_wise


@pytest.mark.parametrize("options", [{}, {"hidden_dim": 5}, {"activation": "identity"}])
def test_the_price_is_what_the_counters_count(options: dict[str, Any]) -> None:
    assert_price_is_counted("glu", options)


def test_dropout_acts_after_the_gate_and_on_the_output_in_training_alone() -> None:
    module, x = glu(dropout=0.5, hidden_dim=500), torch.randn(4, 8, 6)
    assert torch.equal(module.eval()(x).y, module.eval()(x).y)
    dropped = (module.train()(x).y == 0).float().mean()
    assert 0.3 < float(dropped) < 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": 0}, "glu: hidden_dim must be at least 1, got 0"),
        ({"dropout": 1.0}, r"glu: dropout must be in \[0, 1\), got 1.0"),
        ({"activation": "tanh"}, "option 'activation' must be one of 'silu', 'gelu', 'relu', 'sigmoid', 'identity'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        glu(**options)
