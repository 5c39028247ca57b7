"""The Linear Transformer's attention: a normalised sum of φ(q)·φ(k) v, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparison import (
    assert_cross_equals_definition,
    assert_same_values_and_gradients,
    disturbed,
    finish,
    is_valid,
    masks,
    qkv,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad import Mask
from subquad.build import build_mixer
from subquad.layers.feature_sums import FeatureSums
from subquad.layers.heads import HeadMixer
from subquad.ops.features.attention import DENOMINATOR_EPSILON

LENGTHS = st.sampled_from([1, 2, 3, 4, 5, 9, 13])


def linear(chunk: int = 4, *, causal: bool = False, cross: bool = False) -> HeadMixer:
    mixer = build_mixer("linear", embed_dim=4, num_heads=2, causal=causal, cross=cross, chunk=chunk)
    assert isinstance(mixer, HeadMixer)
    return disturbed(mixer)


def definition(mixer: HeadMixer, x: Tensor, source: Tensor, mask: Mask | None, source_mask: Mask | None) -> Tensor:
    q, k, v = qkv(mixer, x, source)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    out = []
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            keys = [
                j for j in range(source.shape[1]) if is_valid(source_mask, b, j) and (j <= i or not mixer.dims.causal)
            ]
            weights = torch.einsum("he,nhe->nh", q[b, i], k[b, keys])
            out.append(
                torch.einsum("nh,nhe->he", weights, v[b, keys]) / (weights.sum(0) + DENOMINATOR_EPSILON)[:, None]
            )
    return finish(mixer, torch.stack(out).unflatten(0, x.shape[:2]), mask)


@pytest.mark.parametrize("causal", [False, True])
@given(length=LENGTHS, data=st.data())
def test_it_equals_the_definition(causal: bool, length: int, data: st.DataObject) -> None:
    mixer, mask = linear(causal=causal), data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(
        mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, x, mask, mask), [x]
    )


@given(length=LENGTHS, source_length=LENGTHS, data=st.data())
def test_cross_attention_equals_the_definition(length: int, source_length: int, data: st.DataObject) -> None:
    mixer = linear(cross=True)
    assert_cross_equals_definition(mixer, definition, length, source_length, data)


@given(chunk=st.integers(1, 20), length=st.integers(1, 17))
def test_the_chunk_changes_nothing_but_speed(chunk: int, length: int) -> None:
    one, other = linear(1, causal=True), linear(chunk, causal=True)
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, length, 4, dtype=torch.float64)
    torch.testing.assert_close(one(x).y, other(x).y, rtol=1e-10, atol=1e-10)


def test_causal_attention_is_a_recurrent_network() -> None:
    """The state after each token is S += φ(k) vᵀ, z += φ(k)."""
    mixer, x = linear(causal=True), torch.randn(1, 6, 4, dtype=torch.float64)
    q, k, v = qkv(mixer, x)
    s, z = torch.zeros(2, 2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    state = mixer.init_state(1)
    for i in range(6):
        y, state, _ = mixer(x[:, i : i + 1], state=state)
        feature = F.elu(k[0, i]) + 1
        s = s + feature[..., None] * v[0, i][:, None, :]
        z = z + feature
        assert isinstance(state, FeatureSums)
        torch.testing.assert_close(state.values[0], s)
        torch.testing.assert_close(state.features[0], z)
        read = F.elu(q[0, i]) + 1
        out = torch.einsum("hf,hfe->he", read, s) / ((read * z).sum(-1, keepdim=True) + DENOMINATOR_EPSILON)
        torch.testing.assert_close(y[0, 0], mixer.project_out(out.flatten()))


def test_sums_in_bfloat16_do_not_stop_growing() -> None:
    """A running sum in bfloat16 stands still at 256 equal terms; over 4096 tokens the mean must still be right."""
    mixer = build_mixer("linear", embed_dim=4, num_heads=2, causal=True).bfloat16()
    x = torch.ones(1, 4096, 4, dtype=torch.bfloat16)
    x[:, 2048:] = -1.0
    y = mixer(x).y
    exact = build_mixer("linear", embed_dim=4, num_heads=2, causal=True)
    exact.load_state_dict({name: value.float() for name, value in mixer.state_dict().items()})
    torch.testing.assert_close(y.float(), exact(x.float()).y, rtol=0.02, atol=0.02)


def test_it_does_not_depend_on_the_scale_of_the_features() -> None:
    """Normalisation cancels a factor of φ(k): the average of equal values is that value."""
    mixer, x = linear(), torch.randn(1, 1, 4, dtype=torch.float64).expand(1, 7, 4)
    expected = mixer.project_out(mixer.project_value(x))
    torch.testing.assert_close(mixer(x).y, expected, rtol=1e-5, atol=1e-5)


def test_a_chunk_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="linear: chunk must be at least 1, got 0"):
        build_mixer("linear", embed_dim=4, num_heads=2, chunk=0)
