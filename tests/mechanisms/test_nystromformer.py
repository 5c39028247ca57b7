"""Nyströmformer: its definition, softmax attention as its limit, and Hugging Face's layer weight for weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import (
    assert_same_values_and_gradients,
    disturbed,
    finish,
    is_valid,
    masks,
    qkv,
    softmax_over,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad import Mask
from subquad.build import build_mixer
from subquad.layers.heads import HeadMixer
from subquad.mechanisms.nystromformer import Nystromformer
from subquad.ops.landmarks import pseudo_inverse
from subquad.ops.rotary import rotate


def nystromformer(**options: Any) -> Nystromformer:
    options = {"embed_dim": 4, "num_heads": 2, "landmarks": 3, "kernel": 3, **options}
    mixer = build_mixer("nystromformer", **options)
    assert isinstance(mixer, Nystromformer)
    disturbed(mixer)
    return mixer


def through_landmarks(q: Tensor, k: Tensor, v: Tensor, segments: list[list[int]], iterations: int) -> Tensor:
    """One example, q, k, v (L, H, E): landmarks are the means of segments, lists of tokens."""
    few_q, few_k = (torch.stack([x[tokens].mean(dim=0) for tokens in segments]) for x in (q, k))
    tokens = [token for segment in segments for token in segment]
    pairs = ((q, few_k), (few_q, few_k), (few_q, k[tokens]))
    f, a, b = ((torch.einsum("ihe,jhe->hij", x, y) / q.shape[2] ** 0.5).softmax(dim=-1) for x, y in pairs)
    return torch.einsum("hij,jhe->ihe", f @ pseudo_inverse(a, iterations) @ b, v[tokens])


def convolved(v: Tensor, kernels: Tensor, tokens: list[int]) -> Tensor:
    """One example, v (L, H, E): the n-th valid token and its neighbours among the valid ones."""
    out, reach = torch.zeros_like(v), kernels.shape[1] // 2
    for n, i in enumerate(tokens):
        near = [(m - n + reach, j) for m, j in enumerate(tokens) if abs(m - n) <= reach]
        out[i] = sum((kernels[:, t, None] * v[j] for t, j in near), out[i])
    return out


def definition(mixer: Nystromformer, x: Tensor, mask: Mask | None) -> Tensor:
    """Valid tokens first, then segments over the whole length, of which the valid tokens count."""
    (q, k, v), landmarks, out = qkv(mixer, x), mixer.config.landmarks, []
    for b in range(x.shape[0]):
        tokens = [j for j in range(x.shape[1]) if is_valid(mask, b, j)]
        cut = [part.tolist() for part in torch.arange(x.shape[1]).tensor_split(landmarks)]
        segments = [[tokens[n] for n in part if n < len(tokens)] for part in cut]
        if not tokens:
            mixed = torch.zeros_like(v[b])
        elif x.shape[1] <= landmarks:
            mixed = torch.stack([softmax_over(q_i, k[b, tokens], v[b, tokens]) for q_i in q[b]])
        else:
            present = [segment for segment in segments if segment]
            mixed = through_landmarks(q[b], k[b], v[b], present, mixer.config.iterations)
        out.append(mixed if mixer.kernels is None else mixed + convolved(v[b], mixer.kernels, tokens))
    return finish(mixer, torch.stack(out), mask)


@pytest.mark.parametrize("options", [{}, {"kernel": 0}, {"iterations": 2, "kernel": 5}], ids=str)
@given(length=st.sampled_from([1, 2, 3, 4, 6, 11]), data=st.data())
def test_it_equals_the_definition(options: dict[str, Any], length: int, data: st.DataObject) -> None:
    mixer, mask = nystromformer(**options), data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


def test_rotated_heads_of_two_channels_are_read_as_they_lie_in_memory() -> None:
    """Rotation lays such heads out with tokens, not channels, as neighbours."""
    mixer, x = nystromformer(positions="rotary", kernel=0), torch.randn(1, 11, 4, dtype=torch.float64)
    q, k, v = (part.transpose(1, 2) for part in qkv(mixer, x))
    q, k = (rotate(part, torch.arange(11)[None]).transpose(1, 2)[0] for part in (q, k))
    segments = [part.tolist() for part in torch.arange(11).tensor_split(3)]
    expected = through_landmarks(q, k, v.transpose(1, 2)[0], segments, mixer.config.iterations)
    torch.testing.assert_close(mixer(x).y, finish(mixer, expected[None], None), rtol=1e-10, atol=1e-10)


def beside_dense(length: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Without a convolution and with dense attention of the same projections, on smooth sequences."""
    mixer = build_mixer("nystromformer", embed_dim=32, num_heads=2, **{"kernel": 0, **options}).double()
    dense = build_mixer("full", embed_dim=32, num_heads=2).double()
    dense.load_state_dict(mixer.state_dict())
    x = torch.randn(2, length, 32, dtype=torch.float64).cumsum(dim=1) / length**0.5
    return mixer(x).y.detach(), dense(x).y.detach()


@pytest.mark.parametrize("length", [1, 15, 16])
def test_as_many_landmarks_as_tokens_give_softmax_attention(length: int) -> None:
    y, dense = beside_dense(length, landmarks=16)
    torch.testing.assert_close(y, dense, rtol=1e-10, atol=1e-10)


def test_the_error_against_softmax_attention_falls_as_landmarks_rise() -> None:
    errors = []
    for landmarks in (4, 16, 64, 256):
        torch.manual_seed(0)
        y, dense = beside_dense(256, landmarks=landmarks, iterations=12)
        errors.append(float((y - dense).norm() / dense.norm()))
    assert 1e-2 > errors[0] > 10 * errors[1] > 20 * errors[2]
    assert errors[3] < 1e-12


def test_more_iterations_come_closer_to_the_exact_pseudo_inverse() -> None:
    results = {}
    for iterations in (2, 6, 12, 40):
        torch.manual_seed(0)
        results[iterations], _ = beside_dense(64, landmarks=8, iterations=iterations)
    errors = [float((results[iterations] - results[40]).norm()) for iterations in (2, 6, 12)]
    assert errors[0] > errors[1] > errors[2]


def test_constant_values_are_returned_unchanged() -> None:
    mixer = nystromformer(kernel=0, iterations=30)
    with torch.no_grad():
        mixer.project_value.weight.zero_()
    x = torch.randn(2, 11, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(x).y, mixer.project_out(mixer.project_value(x)))  # the rows of F A⁺ B sum to 1


@pytest.mark.parametrize("length", [32, 8])
def test_it_equals_hugging_faces_layer_weight_for_weight(length: int) -> None:
    modeling = pytest.importorskip("transformers.models.nystromformer.modeling_nystromformer")
    config = modeling.NystromformerConfig(
        hidden_size=24,
        num_attention_heads=3,
        num_landmarks=8,
        segment_means_seq_len=length,
        conv_kernel_size=5,
    )
    theirs = modeling.NystromformerSelfAttention(config).double().eval()
    mixer = build_mixer("nystromformer", embed_dim=24, num_heads=3, landmarks=8, kernel=5).double()
    weights = mixer.state_dict() | {"project_out.weight": torch.eye(24), "project_out.bias": torch.zeros(24)}
    for ours, name in (("query", "query"), ("key", "key"), ("value", "value")):
        weights |= {f"project_{ours}.{part}": value for part, value in getattr(theirs, name).state_dict().items()}
    mixer.load_state_dict(weights | {"kernels": theirs.conv.weight[:, 0, :, 0]})
    theirs.init_option = "exact"  # each matrix by its own norm; its own option for that can't be set without a crash
    x = torch.randn(1, length, 24, dtype=torch.float64)
    torch.testing.assert_close(mixer(x).y, theirs(x)[0], rtol=1e-10, atol=1e-10)


def test_in_hugging_faces_layer_the_examples_of_a_batch_change_each_other() -> None:
    modeling = pytest.importorskip("transformers.models.nystromformer.modeling_nystromformer")
    config = modeling.NystromformerConfig(
        hidden_size=8, num_attention_heads=1, num_landmarks=4, segment_means_seq_len=16, initializer_range=1.0
    )
    theirs, x = modeling.NystromformerSelfAttention(config).double().eval(), torch.randn(2, 16, 8, dtype=torch.float64)
    others = torch.stack((x[0], 20 * x[1]))
    assert not torch.allclose(theirs(x)[0][0], theirs(others)[0][0], rtol=1e-3, atol=1e-3)
    ours = build_mixer("nystromformer", embed_dim=8, num_heads=1, landmarks=4).double()
    torch.testing.assert_close(ours(x).y[0], ours(others).y[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [3, 12])
def test_padding_anywhere_counts_as_padding_at_the_end(length: int) -> None:
    mixer, x = nystromformer(), torch.randn(1, length, 4, dtype=torch.float64)
    spread = torch.randn(1, 2 * length, 4, dtype=torch.float64)
    right, anywhere = torch.arange(2 * length)[None] < length, (torch.arange(2 * length) % 2 == 1)[None]
    results = []
    for valid in (right, anywhere):
        padded = spread.masked_scatter(valid[..., None], x)
        results.append(mixer(padded, mask=Mask(valid)).y[valid])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


def test_padding_that_fills_whole_segments_changes_nothing() -> None:
    mixer, x = nystromformer(landmarks=6), torch.randn(1, 24, 4, dtype=torch.float64)
    half = nystromformer(landmarks=3)
    half.load_state_dict(mixer.state_dict())
    y = mixer(x, mask=Mask.from_lengths([12], 24)).y[:, :12]
    torch.testing.assert_close(y, half(x[:, :12]).y, rtol=1e-10, atol=1e-10)


def test_only_without_its_convolution_it_approximates_softmax() -> None:
    assert isinstance(nystromformer(), HeadMixer)
    assert nystromformer(kernel=0).config.traits.approximates_softmax
    assert not nystromformer().config.traits.approximates_softmax


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"landmarks": 0}, "nystromformer: landmarks must be at least 1, got 0"),
        ({"iterations": 0}, "nystromformer: iterations must be at least 1, got 0"),
        ({"kernel": 4}, "so it must be odd, or 0 for no convolution; got 4"),
        ({"kernel": -1}, "so it must be odd, or 0 for no convolution; got -1"),
        ({"causal": True}, "nystromformer: causal=True is not supported; mechanisms that support it: "),
        ({"cross": True}, "nystromformer: cross=True is not supported; mechanisms that support it: "),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nystromformer(**options)
