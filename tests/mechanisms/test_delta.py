"""DeltaNet and Gated DeltaNet equal their recurrence, token by token, convolutions included."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import masks
from hypothesis import given
from hypothesis import strategies as st
from recurrences import (
    assert_claims_hold,
    assert_equals_recurrence,
    assert_streams_like_the_whole,
    convolved,
    in_heads,
    recurrent,
    swish,
)
from torch import Tensor
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from subquad.build import build_mixer
from subquad.layers.convolved import ConvolvedState
from subquad.layers.recurrent import NORM_EPSILON
from subquad.mechanisms.delta import Delta

LENGTHS = st.sampled_from([1, 2, 3, 5, 9, 13])
OPTIONS: list[dict[str, Any]] = [
    *({"gated": gated, "kernel": kernel} for gated, kernel in product((False, True), (0, 1, 4))),
    {"kernel": 0, "negative_eigenvalues": True},
    {"gated": True, "kernel": 2, "key_expansion": 0.5, "value_expansion": 2.0},
]


def delta(**options: Any) -> Delta:
    return recurrent(Delta, "delta", **options)


def recur(mixer: Delta, x: Tensor) -> Tensor:
    """S = α S + β k (v - α Sᵀ k)ᵀ, o = Sᵀ q."""
    projected = [mixer.project_query(x), mixer.project_key(x), mixer.project_value(x)]
    if mixer.taps is not None:
        projected = list(convolved(torch.cat(projected, dim=1), mixer.taps).split(mixer.channels, dim=1))
    q, k, v = (in_heads(mixer, swish(tensor)) for tensor in projected)
    q, k = (tensor / (tensor.square().sum(-1, keepdim=True) + 1e-6).sqrt() for tensor in (q, k))
    beta = torch.sigmoid(mixer.project_beta(x)) * (2 if mixer.config.negative_eigenvalues else 1)
    alpha = torch.ones_like(beta)
    if mixer.project_decay is not None and mixer.log_rate is not None and mixer.rate_bias is not None:
        alpha = torch.exp(-mixer.log_rate.exp() * F.softplus(mixer.project_decay(x) + mixer.rate_bias))
    matrix, out = torch.zeros_like(k[0, :, :, None] * v[0, :, None, :]), []
    for t in range(len(x)):
        matrix = alpha[t, :, None, None] * matrix
        missing = v[t] - torch.einsum("hef,he->hf", matrix, k[t])
        matrix = matrix + beta[t, :, None, None] * k[t, :, :, None] * missing[:, None, :]
        out.append(torch.einsum("hef,he->hf", matrix, q[t]))
    return torch.stack(out)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(length=LENGTHS, data=st.data())
def test_it_equals_the_recurrence(options: dict[str, Any], length: int, data: st.DataObject) -> None:
    mask = data.draw(masks(2, length, segments=False))
    assert_equals_recurrence(delta(chunk=4, **options), recur, length, mask)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(pieces=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_a_stream_with_padding_anywhere_goes_on(
    options: dict[str, Any], pieces: list[int], data: st.DataObject
) -> None:
    """What the convolution still sees is the last real tokens, in however small pieces they come."""
    mask = data.draw(masks(2, sum(pieces), segments=False))
    assert_streams_like_the_whole(delta(chunk=4, **options), pieces, mask)


def test_the_state_holds_the_last_inputs_of_the_convolution() -> None:
    mixer, x = delta(), torch.randn(1, 5, 6, dtype=torch.float64)
    state = mixer(x, state=mixer.init_state(1)).state
    assert isinstance(state, ConvolvedState)
    inputs = torch.cat((mixer.project_query(x), mixer.project_key(x), mixer.project_value(x)), dim=2)
    assert torch.equal(state.recent, inputs[:, 2:])


def test_the_gated_layer_equals_that_of_qwen3_next() -> None:
    """With copied weights, in float32; theirs divides queries by √E, which a smaller epsilon cancels."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        hidden_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_conv_kernel_dim=4,
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0).eval()
    ours = build_mixer("delta", gated=True, embed_dim=16, num_heads=2, causal=True, bias=False)
    assert isinstance(ours, Delta)
    assert ours.taps is not None
    assert ours.project_gate is not None
    assert ours.project_decay is not None
    with torch.no_grad():
        by_heads = theirs.in_proj_qkvz.weight.unflatten(0, (2, 4, 8))  # for each head q, k, v and gate
        for index, projection in enumerate(
            (ours.project_query, ours.project_key, ours.project_value, ours.project_gate)
        ):
            projection.weight.copy_(by_heads[:, index].flatten(0, 1))
        beta_and_decay = theirs.in_proj_ba.weight.unflatten(0, (2, 2))
        ours.project_beta.weight.copy_(beta_and_decay[:, 0])
        ours.project_decay.weight.copy_(beta_and_decay[:, 1])
        ours.taps.copy_(theirs.conv1d.weight[:, 0].T.flip(0))
        ours.project_out.weight.copy_(theirs.out_proj.weight)
    ours.log_rate, ours.rate_bias, ours.norm_gain = theirs.A_log, theirs.dt_bias, theirs.norm.weight
    theirs.norm.variance_epsilon = NORM_EPSILON / 8
    x = 10 * torch.randn(2, 70, 16)
    torch.testing.assert_close(ours(x).y, theirs(x), rtol=1e-3, atol=1e-3)


def test_new_rates_and_steps_are_those_of_the_paper() -> None:
    mixer = build_mixer("delta", gated=True, embed_dim=512, num_heads=512, causal=True)
    assert isinstance(mixer, Delta)
    assert mixer.log_rate is not None
    assert mixer.rate_bias is not None
    rates, steps = mixer.log_rate.detach().exp(), F.softplus(mixer.rate_bias.detach())
    assert bool((rates <= 16).all())
    assert float(rates.mean()) == pytest.approx(8, rel=0.15)
    assert bool(((steps > 0.00099) & (steps < 0.101)).all())
    assert float(steps.log().mean()) == pytest.approx(float(torch.tensor(0.01).log()), rel=0.1)


def test_the_claims_of_the_contract_hold_with_other_options() -> None:
    assert_claims_hold("delta", gated=True, negative_eigenvalues=True, kernel=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": -1}, "delta: kernel counts the tokens of a convolution, 0 for none; got -1"),
        ({"value_expansion": 0.3}, "delta: value_expansion=0.3 of head_dim=4 must give a whole width of at least 1"),
        ({"chunk": 0}, "delta: chunk must be at least 1, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer("delta", embed_dim=8, num_heads=2, causal=True, **options)
