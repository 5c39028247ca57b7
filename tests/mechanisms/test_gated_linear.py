"""Gated linear attention equals its recurrence, token by token, however strong its gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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

from subquad.build import build_mixer
from subquad.layers.convolved import ConvolvedState
from subquad.mechanisms.gated_linear import GatedLinear

LENGTHS = st.sampled_from([1, 2, 3, 5, 9, 13])
OPTIONS: list[dict[str, Any]] = [
    {},
    {"norm": "layer", "gate": False, "key_expansion": 1.0, "value_expansion": 1.5},
    {"temperature": 0.05, "rank": 1},
    {"kernel": 4},
    {"kernel": 1, "gate": False, "value_expansion": 1.5},
]


def gated_linear(**options: Any) -> GatedLinear:
    return recurrent(GatedLinear, "gated_linear", **options)


def recur(mixer: GatedLinear, x: Tensor) -> Tensor:
    """S = diag(α) S + k vᵀ, o = Sᵀ q."""
    projected = [mixer.project_query(x), mixer.project_key(x), mixer.project_value(x)]
    if mixer.taps is not None:
        projected = list(swish(convolved(torch.cat(projected, dim=1), mixer.taps)).split(mixer.channels, dim=1))
    q, k, v = (in_heads(mixer, tensor) for tensor in projected)
    logits = mixer.project_forget(mixer.narrow_forget(x))
    alpha = in_heads(mixer, torch.sigmoid(logits) ** (1 / mixer.config.temperature))
    matrix, out = torch.zeros_like(k[0, :, :, None] * v[0, :, None, :]), []
    for t in range(len(x)):
        matrix = alpha[t, :, :, None] * matrix + k[t, :, :, None] * v[t, :, None, :]
        out.append((matrix * q[t, :, :, None]).sum(dim=1))
    return torch.stack(out)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(length=LENGTHS, data=st.data())
def test_it_equals_the_recurrence(options: dict[str, Any], length: int, data: st.DataObject) -> None:
    mask = data.draw(masks(2, length, segments=False))
    assert_equals_recurrence(gated_linear(chunk=4, **options), recur, length, mask)


def test_the_state_holds_the_last_inputs_of_the_convolution() -> None:
    mixer, x = gated_linear(kernel=3), torch.randn(1, 5, 6, dtype=torch.float64)
    state = mixer(x, state=mixer.init_state(1)).state
    assert isinstance(state, ConvolvedState)
    inputs = torch.cat((mixer.project_query(x), mixer.project_key(x), mixer.project_value(x)), dim=2)
    assert torch.equal(state.recent, inputs[:, 3:])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(pieces=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_a_stream_in_pieces_equals_the_whole(options: dict[str, Any], pieces: list[int], data: st.DataObject) -> None:
    mask = data.draw(masks(2, sum(pieces), segments=False))
    assert_streams_like_the_whole(gated_linear(chunk=4, **options), pieces, mask)


def test_a_closed_gate_forgets_everything_but_the_token() -> None:
    mixer = gated_linear()
    with torch.no_grad():
        mixer.project_forget.bias.fill_(-1e4)
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    alone = torch.cat([mixer(x[:, i : i + 1]).y for i in range(9)], dim=1)
    torch.testing.assert_close(mixer(x).y, alone, rtol=1e-10, atol=1e-10)


def test_an_open_gate_sums_everything() -> None:
    mixer = gated_linear(gate=False)
    with torch.no_grad():
        mixer.project_forget.weight.zero_()
        mixer.project_forget.bias.fill_(1e4)
    x = torch.randn(1, 70, 6, dtype=torch.float64)
    q, k, v = (
        in_heads(mixer, project(x[0])) for project in (mixer.project_query, mixer.project_key, mixer.project_value)
    )
    out = torch.einsum("hij,jhe->ihe", torch.einsum("ihe,jhe->hij", q, k).tril(), v)
    assert mixer.norm_gain is not None
    normed = out * (out.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * mixer.norm_gain
    torch.testing.assert_close(mixer(x).y[0], mixer.project_out(normed.flatten(1)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", [0, 3])
def test_the_claims_of_the_contract_hold_with_other_options(kernel: int) -> None:
    assert_claims_hold("gated_linear", norm="layer", gate=False, temperature=0.1, kernel=kernel)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "gated_linear: rank must be at least 1, got 0"),
        ({"temperature": 0.0}, "gated_linear: temperature must be above 0, got 0.0"),
        ({"key_expansion": 0.3}, "gated_linear: key_expansion=0.3 of head_dim=4 must give a whole width of at least 1"),
        ({"value_expansion": 0.0}, "gated_linear: value_expansion=0.0 of head_dim=4 must give a whole width"),
        ({"kernel": -1}, "gated_linear: kernel counts the tokens of a convolution, 0 for none; got -1"),
        ({"chunk": 0}, "gated_linear: chunk must be at least 1, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer("gated_linear", embed_dim=8, num_heads=2, causal=True, **options)
