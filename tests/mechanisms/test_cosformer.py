"""cosFormer equals its definition by pairs, and M is a constant, so that prefixes and streams agree."""

from __future__ import annotations

import math

import pytest
import torch
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
from subquad.layers.heads import HeadMixer
from subquad.ops.features.attention import DENOMINATOR_EPSILON

LENGTHS = st.sampled_from([1, 2, 3, 5, 9, 13])
LONGEST = 16


def cosformer(*, causal: bool = False, cross: bool = False) -> HeadMixer:
    mixer = build_mixer("cosformer", embed_dim=4, num_heads=2, causal=causal, cross=cross, max_length=LONGEST)
    assert isinstance(mixer, HeadMixer)
    return disturbed(mixer)


def definition(mixer: HeadMixer, x: Tensor, source: Tensor, mask: Mask | None, source_mask: Mask | None) -> Tensor:
    """Weights relu(q)·relu(k) cos(π (i - j) / 2M), where i and j count valid tokens."""
    q, k, v = qkv(mixer, x, source)
    out = []
    for b in range(x.shape[0]):
        keys = [j for j in range(source.shape[1]) if is_valid(source_mask, b, j)]
        rank = 0
        for i in range(x.shape[1]):
            seen = [place for place, j in enumerate(keys) if j <= i or not mixer.dims.causal]
            angles = [math.pi * (rank - place) / (2 * LONGEST) for place in seen]
            cosines = torch.tensor(angles, dtype=torch.float64).cos()
            chosen = [keys[place] for place in seen]
            weights = torch.einsum("he,nhe->nh", q[b, i].relu(), k[b, chosen].relu()) * cosines[:, None]
            read = torch.einsum("nh,nhe->he", weights, v[b, chosen])
            out.append(read / (weights.sum(0) + DENOMINATOR_EPSILON)[:, None])
            rank += is_valid(mask, b, i)
    return finish(mixer, torch.stack(out).unflatten(0, x.shape[:2]), mask)


@pytest.mark.parametrize("causal", [False, True])
@given(length=LENGTHS, data=st.data())
def test_it_equals_the_definition(causal: bool, length: int, data: st.DataObject) -> None:
    mixer, mask = cosformer(causal=causal), data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(
        mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, x, mask, mask), [x]
    )


@given(length=LENGTHS, source_length=LENGTHS, data=st.data())
def test_cross_attention_equals_the_definition(length: int, source_length: int, data: st.DataObject) -> None:
    assert_cross_equals_definition(cosformer(cross=True), definition, length, source_length, data)


def test_weights_depend_on_the_distance_alone() -> None:
    """Tokens that are shifted by padding in front of them, or counted on by a state, are weighed alike."""
    mixer, x = cosformer(causal=True), torch.randn(1, 8, 4, dtype=torch.float64)
    alone = mixer(x).y
    shifted = mixer(torch.cat((torch.zeros_like(x), x), dim=1), mask=Mask((torch.arange(16) >= 8)[None])).y
    torch.testing.assert_close(shifted[:, 8:], alone, rtol=1e-10, atol=1e-10)


def test_without_positive_products_nothing_is_read() -> None:
    mixer, x = cosformer(), torch.randn(1, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        mixer.project_query.weight.zero_()
        assert mixer.project_query.bias is not None
        mixer.project_query.bias.fill_(-1.0)
    torch.testing.assert_close(mixer(x).y, mixer.project_out.bias.expand(1, 5, 4))


def test_a_stream_longer_than_the_constant_is_refused() -> None:
    mixer, x = cosformer(causal=True), torch.randn(1, 10, 4, dtype=torch.float64)
    state = mixer(x, state=mixer.init_state(1)).state
    assert state is not None
    mixer(x[:, :6], state=state)
    with pytest.raises(ValueError, match="cosformer: the stream has come to 17 tokens but was built for max_length=16"):
        mixer(x[:, :7], state=state)


def test_the_longest_input_is_required() -> None:
    with pytest.raises(ValueError, match=r"cosformer: .* pass max_length"):
        build_mixer("cosformer", embed_dim=4, num_heads=2)


def test_a_context_is_summed_once() -> None:
    mixer = cosformer(cross=True)
    x, context = torch.randn(1, 5, 4, dtype=torch.float64), torch.randn(1, 7, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="cosformer: the state holds no context yet; pass context"):
        mixer(x, state=mixer.init_state(1))
    state = mixer(x, context, state=mixer.init_state(1)).state
    assert state is not None
    with pytest.raises(ValueError, match="cosformer: the state holds a context already; pass context=None"):
        mixer(x, context, state=state)
