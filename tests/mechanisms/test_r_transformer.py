"""R-Transformer: recurrent networks over windows, then causal attention, then a feed-forward."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_same_values_and_gradients, is_valid, masks, softmax_over
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from subquad import Mask
from subquad.build import cost, make_dims
from subquad.mechanisms.r_transformer import LocalNetwork, RTransformer, RTransformerConfig

NETWORKS: dict[str, type[nn.RNN | nn.GRU | nn.LSTM]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
CONFIGS = st.builds(
    RTransformerConfig,
    cell=st.sampled_from(["rnn", "gru", "lstm"]),
    window=st.sampled_from([1, 2, 5, 20]),
    local_layers=st.integers(0, 2),
    hidden_dim=st.sampled_from([None, 5]),
)


def r_transformer(config: RTransformerConfig) -> RTransformer:
    """In float64, with no parameter at 0 or 1."""
    dims = make_dims(embed_dim=4, num_heads=2, head_dim=3, causal=True)
    mixer = RTransformer(config, dims).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return mixer


def networks(mixer: RTransformer) -> list[LocalNetwork]:
    return [network for network in mixer.local_networks if isinstance(network, LocalNetwork)]


def last_state(config: RTransformerConfig, network: LocalNetwork, tokens: Tensor) -> Tensor:
    """What torch's network ends with after the tokens (M, D)."""
    layer = NETWORKS[config.cell](input_size=4, hidden_size=4, batch_first=True).double()
    written = {
        "weight_ih_l0": network.project_input.weight,
        "weight_hh_l0": network.weights,
        "bias_ih_l0": network.project_input.bias,
        "bias_hh_l0": network.biases,
    }
    return torch.func.functional_call(layer, written, tokens[None])[0][0, -1]


def transformed(mixer: RTransformer, x: Tensor) -> Tensor:
    """The definition for one sequence (L, D) without padding, token by token."""
    window = mixer.config.window
    for network in networks(mixer):
        padded = torch.cat((x.new_zeros(window - 1, 4), network.norm(x)))
        x = x + torch.stack([last_state(mixer.config, network, padded[t : t + window]) for t in range(len(x))])
    u = mixer.attention_norm(x)
    q, k, v = (
        projection(u).unflatten(-1, (2, 3))
        for projection in (mixer.project_query, mixer.project_key, mixer.project_value)
    )
    read = torch.stack([softmax_over(q[i], k[: i + 1], v[: i + 1]).flatten() for i in range(len(x))])
    x = x + mixer.project_out(read)
    return x + mixer.contract(mixer.expand(mixer.feedforward_norm(x)).clamp_min(0))


def definition(mixer: RTransformer, x: Tensor, mask: Mask | None) -> Tensor:
    y = []
    for b in range(len(x)):
        places = [i for i in range(x.shape[1]) if is_valid(mask, b, i)]
        results = dict(zip(places, transformed(mixer, x[b, places]) if places else [], strict=True))
        y.append(torch.stack([results.get(i, 0 * x[b, i]) for i in range(x.shape[1])]))
    return torch.stack(y)


@given(config=CONFIGS, length=st.sampled_from([1, 2, 5, 9]), data=st.data())
@example(config=RTransformerConfig(window=3), length=7, data=None)
@example(config=RTransformerConfig(window=3, cell="lstm", local_layers=2), length=7, data=None)
def test_it_equals_the_definition(config: RTransformerConfig, length: int, data: st.DataObject | None) -> None:
    mixer, mask = r_transformer(config), None if data is None else data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@pytest.mark.parametrize("cell", NETWORKS)
@pytest.mark.parametrize(("window", "local_layers"), [(1, 1), (4, 2), (20, 1), (4, 0)])
def test_every_form_is_a_stream(cell: str, window: int, local_layers: int) -> None:
    """Calls of any size whose rows hold different numbers of tokens, also none."""
    mixer = r_transformer(
        RTransformerConfig.from_dict(
            {"name": "r_transformer", "cell": cell, "window": window, "local_layers": local_layers}
        )
    )
    x = torch.randn(3, 11, 4, dtype=torch.float64)
    for mask in (None, Mask(torch.rand(3, 11) < 0.5)):
        y, state, start = mixer(x, mask=mask).y, mixer.init_state(3), 0
        for size in (4, 1, 1, 5):
            stop = start + size
            facts = None if mask is None or mask.valid is None else Mask(mask.valid[:, start:stop])
            part, state, _ = mixer(x[:, start:stop], mask=facts, state=state)
            torch.testing.assert_close(part, y[:, start:stop], rtol=1e-10, atol=1e-10)
            start = stop


def test_without_biases_a_window_over_everything_is_an_ordinary_network() -> None:
    dims = make_dims(embed_dim=4, num_heads=2, causal=True, bias=False)
    network = LocalNetwork(RTransformerConfig(window=9), dims).double()
    network.initialise()
    layer = nn.GRU(4, 4, bias=False, batch_first=True).double()
    layer.load_state_dict({"weight_ih_l0": network.project_input.weight, "weight_hh_l0": network.weights})
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    torch.testing.assert_close(network(x, None)[0], layer(network.norm(x))[0], rtol=1e-10, atol=1e-10)


def test_without_local_networks_earlier_tokens_have_no_order() -> None:
    mixer, x = r_transformer(RTransformerConfig(local_layers=0)), torch.randn(1, 6, 4, dtype=torch.float64)
    turned = torch.cat((x[:, :5].flip(1), x[:, 5:]), dim=1)
    torch.testing.assert_close(mixer(turned).y[:, 5], mixer(x).y[:, 5], rtol=1e-10, atol=1e-10)
    ordered = r_transformer(RTransformerConfig(window=2))
    assert (ordered(turned).y[:, 5] - ordered(x).y[:, 5]).abs().max() > 1e-4


@given(config=CONFIGS, bias=st.booleans())
def test_the_price_knows_the_parameters_of_every_form(config: RTransformerConfig, bias: bool) -> None:
    dims = make_dims(embed_dim=6, num_heads=2, head_dim=5, bias=bias, causal=True)
    module = RTransformer(config, dims)
    assert config.cost(dims, 10, 4).parameters == sum(parameter.numel() for parameter in module.parameters())


def test_a_wider_window_costs_one_product_more_for_each_token() -> None:
    sizes = {"length": 50, "embed_dim": 8, "num_heads": 2, "causal": True}
    price, wider = (cost("r_transformer", **sizes, window=window) for window in (4, 5))
    assert wider.flops - price.flops == 2 * 8 * 24 * (50 + 1)  # and one more token before the first
    assert wider.activation_bytes - price.activation_bytes == 4 * (8 + 24)


@pytest.mark.parametrize(
    ("option", "value", "least"), [("window", 0, 1), ("local_layers", -1, 0), ("hidden_dim", 0, 1)]
)
def test_sizes_out_of_range_are_refused(option: str, value: int, least: int) -> None:
    with pytest.raises(ValueError, match=f"r_transformer: {option} must be at least {least}, got {value}"):
        RTransformerConfig.from_dict({"name": "r_transformer", option: value})
