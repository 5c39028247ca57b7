"""MLP-Mixer: an MLP along the tokens, then one along the channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_same_values_and_gradients, is_valid, masks
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from subquad import Mask
from subquad.build import cost, make_dims
from subquad.mechanisms.mlp_mixer import MlpMixer, MlpMixerConfig

LONGEST = 12
CONFIGS = st.builds(
    MlpMixerConfig, token_hidden_dim=st.sampled_from([None, 1, 7]), hidden_dim=st.sampled_from([None, 5])
)


def mlp_mixer(config: MlpMixerConfig) -> MlpMixer:
    """In float64, with no parameter at 0 or 1."""
    mixer = MlpMixer(config, make_dims(embed_dim=4, num_heads=2, max_length=LONGEST)).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return mixer


def mixed(mixer: MlpMixer, x: Tensor) -> Tensor:
    """The definition for one sequence (L, D), filled up with zeros behind its norm, channel by channel."""
    normed = F.pad(mixer.token_norm(x), (0, 0, 0, LONGEST - len(x)))
    columns = [mixer.spread_tokens(F.gelu(mixer.gather_tokens(channel))) for channel in normed.unbind(dim=1)]
    u = x + torch.stack(columns, dim=1)[: len(x)]
    rows = [mixer.contract(F.gelu(mixer.expand(mixer.channel_norm(token)))) for token in u]
    return u + torch.stack(rows)


def definition(mixer: MlpMixer, x: Tensor, mask: Mask | None) -> Tensor:
    y = []
    for b in range(len(x)):
        places = [i for i in range(x.shape[1]) if is_valid(mask, b, i)]
        results = dict(zip(places, mixed(mixer, x[b, places]) if places else [], strict=True))
        y.append(torch.stack([results.get(i, 0 * x[b, i]) for i in range(x.shape[1])]))
    return torch.stack(y)


@given(config=CONFIGS, length=st.sampled_from([1, 2, 5, LONGEST]), data=st.data())
@example(config=MlpMixerConfig(), length=7, data=None)
def test_it_equals_the_definition(config: MlpMixerConfig, length: int, data: st.DataObject | None) -> None:
    mixer, mask = mlp_mixer(config), None if data is None else data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


def test_every_token_sees_every_token() -> None:
    mixer, x = mlp_mixer(MlpMixerConfig()), torch.randn(1, 9, 4, dtype=torch.float64, requires_grad=True)
    y = mixer(x).y
    for i in (0, 8):
        (gradient,) = torch.autograd.grad((y[0, i] * torch.randn(4)).sum(), x, retain_graph=True)
        assert bool((gradient[0].abs().amax(dim=1) > 0).all())


@given(config=CONFIGS, bias=st.booleans())
def test_the_price_knows_the_parameters_of_every_form(config: MlpMixerConfig, bias: bool) -> None:
    dims = make_dims(embed_dim=5, num_heads=1, max_length=9, bias=bias)
    module = MlpMixer(config, dims)
    assert config.cost(dims, 9, 4).parameters == sum(parameter.numel() for parameter in module.parameters())


def test_the_price_is_that_of_the_papers_sizes() -> None:
    """S/16 on images of 196 patches: D = 512, S = 256, F = 2048."""
    price = cost("mlp_mixer", length=196, embed_dim=512, num_heads=8, max_length=196)
    assert price.flops == 2 * 2 * 196 * 512 * (256 + 2048)
    assert price.parameters == 2 * 196 * 256 + 256 + 196 + 2 * 512 * 2048 + 2048 + 512 + 4 * 512


def test_a_layer_without_width_is_refused() -> None:
    with pytest.raises(ValueError, match="mlp_mixer: token_hidden_dim must be at least 1, got 0"):
        MlpMixerConfig(token_hidden_dim=0)
    with pytest.raises(ValueError, match="mlp_mixer: hidden_dim must be at least 1, got -1"):
        MlpMixerConfig(hidden_dim=-1)
