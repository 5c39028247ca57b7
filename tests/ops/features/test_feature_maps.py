"""Feature maps: definitions without bias or cancellation, and sliced forms that are the same up to a factor per row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.features.maps import (
    EluPlusOne,
    FeatureMap,
    HyperbolicRandom,
    PlainRelu,
    PositiveRandom,
    Ready,
    ReluRandom,
    TrigonometricRandom,
)
from subquad.ops.features.random_features import (
    elu_plus_one,
    hyperbolic_features,
    plain_relu_features,
    positive_features,
    random_directions,
    relu_features,
    trigonometric_features,
)

WIDTH, DRAWS = 4, 4000
DIRECTIONS = torch.randn(6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

MAPS: dict[str, tuple[FeatureMap, Callable[[Tensor], Tensor]]] = {
    "ready": (Ready(), lambda x: x),
    "elu": (EluPlusOne(), elu_plus_one),
    "positive": (PositiveRandom(DIRECTIONS, 1.0), lambda x: positive_features(x, DIRECTIONS)),
    "hyperbolic": (HyperbolicRandom(DIRECTIONS, 1.0), lambda x: hyperbolic_features(x, DIRECTIONS)),
    "trigonometric": (TrigonometricRandom(DIRECTIONS, 1.0), lambda x: trigonometric_features(x, DIRECTIONS)),
    "relu": (ReluRandom(DIRECTIONS, 1.0, 1e-3), lambda x: relu_features(x, DIRECTIONS, 1e-3)),
    "plain relu": (PlainRelu(1e-3), lambda x: plain_relu_features(x, 1e-3)),
}
ESTIMATORS = {
    "positive": positive_features,
    "hyperbolic": hyperbolic_features,
    "trigonometric": trigonometric_features,
}


def test_elu_plus_one_is_elu_plus_one_with_its_gradient() -> None:
    x = torch.tensor([-30.0, -5.0, -1e-3, 0.0, 1e-3, 2.0], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(elu_plus_one(x), F.elu(x) + 1, rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad(elu_plus_one(x).sum(), x)
    (expected,) = torch.autograd.grad((F.elu(x) + 1).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("features", [elu_plus_one, EluPlusOne().queries])
def test_elu_plus_one_keeps_what_bfloat16_would_cancel(features: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([-10.0, -20.0], dtype=torch.bfloat16)
    assert not (F.elu(x) + 1).any()
    assert bool((features(x) > 0).all())


def as_keys(feature_map: FeatureMap, x: Tensor, above: float = 0.7) -> tuple[Tensor, Tensor]:
    """Features of keys, relative to a reference above the peak, and the factor that this took out."""
    prepared = feature_map.prepare(x)
    if prepared.peak is None:
        return feature_map.finish(prepared, None), torch.zeros_like(x[..., :1])
    reference = prepared.peak + above
    return feature_map.finish(prepared, reference), reference


@pytest.mark.parametrize("name", MAPS)
def test_sliced_maps_are_their_definitions_up_to_one_factor_per_row(name: str) -> None:
    feature_map, definition = MAPS[name]
    x = torch.randn(2, 3, 5, WIDTH, dtype=torch.float64).abs()
    assert feature_map.count(WIDTH) == definition(x).shape[-1]
    queries, (keys, reference) = feature_map.queries(x), as_keys(feature_map, x)
    exact = definition(x)
    ratios = queries / exact
    torch.testing.assert_close(ratios, ratios[..., :1].expand_as(ratios))
    assert bool((ratios > 0).all())
    ratios = keys * reference.exp() / exact
    torch.testing.assert_close(ratios, ratios.flatten()[0].expand_as(ratios))  # one factor for all keys


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("keys", [False, True])
def test_gradients_are_those_of_the_features(name: str, keys: bool) -> None:
    feature_map, definition = MAPS[name]
    x = torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
    rows = x.detach()
    features = as_keys(feature_map, rows)[0] if keys else feature_map.queries(rows)
    exact, weights = definition(x), torch.randn_like(features)
    factor = (features / exact).detach()[:, :1]  # of the row, a constant to the gradient
    if not keys and feature_map.exponential:  # what a query's features leave out
        sign = 1 if name == "trigonometric" else -1
        exact = exact * torch.exp(-sign * x.square().sum(dim=-1, keepdim=True) / 2)
        factor = (features / exact).detach()[:, :1]
    (expected,) = torch.autograd.grad((exact * factor * weights).sum(), x)
    found = feature_map.gradient(rows, features.clone(), weights.clone(), torch.empty_like(x), keys=keys)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["positive", "hyperbolic"])
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_positive_features_of_huge_rows_do_not_overflow(name: str, scale: float) -> None:
    feature_map = type(MAPS[name][0])(DIRECTIONS.float(), 1.0)  # pyright: ignore[reportCallIssue] - both take directions
    x = scale * torch.randn(50, WIDTH)
    for features in (feature_map.queries(x), as_keys(feature_map, x, above=0.0)[0]):
        assert bool(features.isfinite().all())
        torch.testing.assert_close(features.amax(dim=-1), torch.ones(50))


def orthant(signs: tuple[int, ...]) -> Tensor:
    """A vector of length about 0.9 in the orthant of these signs."""
    return torch.tensor(signs, dtype=torch.float64) * torch.tensor([0.5, 0.3, 0.6, 0.4], dtype=torch.float64)


ORTHANTS = [(1, 1, 1, 1), (-1, -1, -1, -1), (1, -1, 1, -1), (-1, 1, 1, -1)]


def estimates(
    draw: Callable[[torch.Generator], Tensor], features: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> Tensor:
    """φ(x)·φ(y) / exp(x·y) for many draws."""
    generator = torch.Generator().manual_seed(7)
    directions = torch.stack([draw(generator) for _ in range(DRAWS)])
    return torch.stack([features(x, one) @ features(y, one) for one in directions]) / (x @ y).exp()


def mean_and_error(samples: Tensor) -> tuple[float, float]:
    return float(samples.mean()), float(samples.std() / len(samples) ** 0.5)


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("signs", ORTHANTS, ids=str)
def test_the_kernel_estimate_is_unbiased_in_every_orthant(signs: tuple[int, ...], name: str, orthogonal: bool) -> None:
    x = orthant(signs)
    samples = estimates(
        lambda g: random_directions(WIDTH, WIDTH, orthogonal=orthogonal, generator=g), ESTIMATORS[name], x, 0.9 * x
    )
    mean, error = mean_and_error(samples)
    assert abs(mean - 1) < 4 * error


def test_without_the_signs_of_r_the_estimate_is_biased() -> None:
    """What is left out by the official code: the test above would see it."""

    def biased(generator: torch.Generator) -> Tensor:
        gaussian = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        lengths = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64).norm(dim=1)
        return torch.linalg.qr(gaussian)[0].T * lengths[:, None]

    found = [mean_and_error(estimates(biased, positive_features, orthant(s), 0.9 * orthant(s))) for s in ORTHANTS[:2]]
    assert any(abs(mean - 1) > 8 * error for mean, error in found)


VARIANCES: dict[str, Callable[[float, float, float], float]] = {
    # of one independent direction, relative to exp(2 x·y); s = |x + y|², d = |x - y|², p = x·y
    "positive": lambda s, d, p: math.exp(s) - 1,
    "hyperbolic": lambda s, d, p: (math.exp(s) + math.exp(-s)) / 2 - 1 if s else 0.0,
    "trigonometric": lambda s, d, p: math.exp(d) * (1 - math.exp(-d)) ** 2 / 2,
}


@pytest.mark.parametrize("name", VARIANCES)
def test_the_variance_of_independent_features_is_that_of_the_formula(name: str) -> None:
    """For m directions it is v / m; hyperbolic features halve it where both signs are far apart."""
    x = orthant((1, -1, 1, -1))
    y = 0.6 * orthant((1, 1, 1, -1))
    s, d = float((x + y).square().sum()), float((x - y).square().sum())
    samples = estimates(
        lambda g: random_directions(WIDTH, WIDTH, orthogonal=False, generator=g), ESTIMATORS[name], x, y
    )
    expected = VARIANCES[name](s, d, float(x @ y)) / WIDTH
    assert float(samples.var()) == pytest.approx(expected, rel=0.25)


def test_orthogonal_directions_have_the_smaller_variance() -> None:
    """By 15 % here: 2 (m - 1) / (m (d + 2)) of the squared kernel, at least."""
    x = torch.full((16,), 0.125, dtype=torch.float64)
    independent, orthogonal = (
        estimates(lambda g, o=o: random_directions(16, 16, orthogonal=o, generator=g), positive_features, x, x).var()
        for o in (False, True)
    )
    assert float(orthogonal) < 0.93 * float(independent)


@pytest.mark.parametrize(("count", "width"), [(4, 4), (3, 8), (10, 4), (64, 16)])
@pytest.mark.parametrize("norms", ["random", "constant"])
def test_directions_are_orthogonal_within_blocks(count: int, width: int, norms: Literal["random", "constant"]) -> None:
    directions = random_directions(count, width, norms=norms, generator=torch.Generator().manual_seed(0))
    assert directions.shape == (count, width)
    for start in range(0, count, width):
        gram = directions[start : start + width] @ directions[start : start + width].T
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_constant_norms_are_the_root_of_the_width(orthogonal: bool) -> None:
    options: dict[str, Any] = {"orthogonal": orthogonal, "generator": torch.Generator().manual_seed(0)}
    directions = random_directions(10, 4, norms="constant", **options)
    torch.testing.assert_close(directions.norm(dim=1), torch.full((10,), 2.0, dtype=torch.float64))


def test_drawing_does_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    random_directions(8, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_gradient_of_elu_that_torch_hides_is_what_it_was() -> None:
    x, grad = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
    y = torch.nn.functional.elu(x)
    (expected,) = torch.autograd.grad(y, x, grad)
    found = torch.empty_like(grad)
    torch.ops.aten.elu_backward.grad_input(grad, 1, 1, 1, True, y.detach(), grad_input=found)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
