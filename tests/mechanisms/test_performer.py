"""FAVOR+: unbiased positive orthogonal features, and linear attention with them."""

from __future__ import annotations

from typing import Any, Literal

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
from subquad.mechanisms.performer import Performer
from subquad.ops.features import orthogonal_features, positive_features

WIDTH = 4
DRAWS = 4000


def performer(**options: Any) -> Performer:
    mixer = build_mixer("performer", embed_dim=4, num_heads=2, **{"features": 6, **options})
    assert isinstance(mixer, Performer)
    disturbed(mixer)
    return mixer


def definition(mixer: Performer, x: Tensor, source: Tensor, mask: Mask | None, source_mask: Mask | None) -> Tensor:
    """Stabilisers are constants to the gradient; ε is added to every feature of a real token."""
    q, k, v = (tensor * mixer.dims.head_dim**-0.25 for tensor in qkv(mixer, x, source))
    v = v * mixer.dims.head_dim**0.25
    directions, epsilon = mixer.directions, mixer.config.epsilon
    out = []
    for b in range(x.shape[0]):
        keys = [j for j in range(source.shape[1]) if is_valid(source_mask, b, j)]
        exponents = k[b, keys] @ directions.T - k[b, keys].square().sum(-1, keepdim=True) / 2
        for i in range(x.shape[1]):
            if not keys:
                out.append(torch.zeros_like(v[b, 0]))
                continue
            projected = q[b, i] @ directions.T
            of_query = (projected - projected.detach().amax(-1, keepdim=True)).exp() + epsilon
            of_keys = (exponents - exponents.detach().amax((0, 2), keepdim=True)).exp() + epsilon
            weights = torch.einsum("hm,nhm->nh", of_query, of_keys)
            out.append(torch.einsum("nh,nhe->he", weights / weights.sum(0), v[b, keys]))
    return finish(mixer, torch.stack(out).unflatten(0, x.shape[:2]), mask)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 1e-2])
@given(length=st.sampled_from([1, 2, 5, 9]), data=st.data())
def test_it_equals_the_definition(epsilon: float, length: int, data: st.DataObject) -> None:
    mixer, mask = performer(epsilon=epsilon), data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(
        mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, x, mask, mask), [x]
    )


@given(length=st.sampled_from([1, 6]), source_length=st.sampled_from([1, 5]), data=st.data())
def test_cross_attention_equals_the_definition(length: int, source_length: int, data: st.DataObject) -> None:
    mixer = performer(cross=True)
    assert_cross_equals_definition(mixer, definition, length, source_length, data)


def test_an_empty_context_gives_finite_gradients() -> None:
    mixer = performer(cross=True).float()
    x, source = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True)
    mixer(x, source, context_mask=Mask.from_lengths([0, 5], 5)).y.sum().mul(1e6).backward()
    assert all(bool(p.grad.isfinite().all()) for p in mixer.parameters() if p.grad is not None)
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def orthant(signs: tuple[int, ...]) -> Tensor:
    """A vector of length about 0.9 in the orthant of these signs."""
    return torch.tensor(signs, dtype=torch.float64) * torch.tensor([0.5, 0.3, 0.6, 0.4], dtype=torch.float64)


ORTHANTS = [(1, 1, 1, 1), (-1, -1, -1, -1), (1, -1, 1, -1), (-1, 1, 1, -1)]


def mean_estimate(signs: tuple[int, ...], draw: Any) -> tuple[float, float]:
    """Mean over many draws of φ(x)·φ(y) / exp(x·y), and its standard error."""
    x, y = orthant(signs), orthant(signs) * 0.9
    generator = torch.Generator().manual_seed(7)
    estimates = []
    for _ in range(DRAWS):
        directions = draw(generator)
        estimates.append(positive_features(x, directions) @ positive_features(y, directions))
    ratios = torch.stack(estimates) / (x @ y).exp()
    return float(ratios.mean()), float(ratios.std() / DRAWS**0.5)


@pytest.mark.parametrize("signs", ORTHANTS, ids=str)
def test_the_kernel_estimate_is_unbiased_in_every_orthant(signs: tuple[int, ...]) -> None:
    mean, error = mean_estimate(signs, lambda g: orthogonal_features(WIDTH, WIDTH, norms="random", generator=g))
    assert abs(mean - 1) < 4 * error


def test_without_the_signs_of_r_the_estimate_is_biased() -> None:
    """What is left out by the official code: the test above would see it."""

    def biased(generator: torch.Generator) -> Tensor:
        gaussian = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        lengths = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64).norm(dim=1)
        return torch.linalg.qr(gaussian)[0].T * lengths[:, None]

    means = [mean_estimate(signs, biased) for signs in ORTHANTS[:2]]
    assert any(abs(mean - 1) > 8 * error for mean, error in means)


@pytest.mark.parametrize(("count", "width"), [(4, 4), (3, 8), (10, 4), (64, 16)])
@pytest.mark.parametrize("norms", ["random", "constant"])
def test_directions_are_orthogonal_within_blocks(count: int, width: int, norms: Literal["random", "constant"]) -> None:
    directions = orthogonal_features(count, width, norms=norms, generator=torch.Generator().manual_seed(0))
    assert directions.shape == (count, width)
    for start in range(0, count, width):
        gram = directions[start : start + width] @ directions[start : start + width].T
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-10)
    if norms == "constant":
        torch.testing.assert_close(directions.norm(dim=1), torch.full((count,), width**0.5, dtype=torch.float64))


@torch.no_grad()
def error_against_softmax(features: int) -> float:
    """Relative error of the output, mean over 20 layers' features, at small inputs."""
    torch.manual_seed(0)
    dense = build_mixer("full", embed_dim=16, num_heads=2).double()
    x = 0.25 * torch.randn(1, 64, 16, dtype=torch.float64)
    expected, errors = dense(x).y, []
    for layer in range(20):
        mixer = build_mixer("performer", embed_dim=16, num_heads=2, features=features, layer=layer).double()
        mixer.load_state_dict(dense.state_dict() | {"directions": mixer.state_dict()["directions"]})
        errors.append(float((mixer(x).y - expected).norm() / expected.norm()))
    return sum(errors) / len(errors)


def test_the_error_falls_like_the_root_of_the_number_of_features() -> None:
    few, many = error_against_softmax(32), error_against_softmax(512)
    assert 2.5 < few / many < 6.5  # the root of 16 is 4
    assert many < 0.1


def test_features_are_drawn_once_from_seed_and_layer_and_saved() -> None:
    assert torch.equal(performer().directions, performer().directions)
    assert not torch.equal(performer().directions, performer(layer=1).directions)
    assert not torch.equal(performer().directions, performer(seed=1).directions)
    assert "directions" in performer().state_dict()


def test_building_does_not_touch_the_global_generator_for_its_features() -> None:
    before = torch.get_rng_state()
    orthogonal_features(8, 4, norms="random", generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_stabilisers_cancel_without_epsilon() -> None:
    mixer, x = performer(epsilon=0.0), torch.randn(2, 7, 4, dtype=torch.float64)
    q, k, v = (tensor.transpose(1, 2) for tensor in qkv(mixer, x))
    scale = mixer.dims.head_dim**-0.25
    of_query, of_keys = (positive_features(scale * tensor, mixer.directions) for tensor in (q, k))
    weights = of_query @ of_keys.mT
    out = (weights / weights.sum(-1, keepdim=True)) @ v
    torch.testing.assert_close(mixer(x).y, finish(mixer, out.transpose(1, 2), None), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 0}, "performer: features must be at least 1, got 0"),
        ({"epsilon": -1.0}, "performer: epsilon must not be negative, got -1.0"),
        ({"seed": -1}, "performer: seed must not be negative, got -1"),
        ({"norms": "unit"}, "option 'norms' must be one of 'random', 'constant', got 'unit'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        performer(**options)
