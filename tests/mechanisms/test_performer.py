"""FAVOR+: attention by random features in all forms, causally without any sight of the future."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

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
    streamed,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad import Mask
from subquad.benchmark.probes import run_probes
from subquad.build import build_mixer, make_dims, mixer_config
from subquad.layers.feature_sums import FeatureSums
from subquad.mechanisms.performer import Performer
from subquad.ops.features.random_features import (
    hyperbolic_features,
    plain_relu_features,
    positive_features,
    relu_features,
    trigonometric_features,
)

KERNELS = ("positive", "hyperbolic", "trigonometric", "relu", "plain_relu")


def performer(*, causal: bool = False, cross: bool = False, layer: int = 0, **options: Any) -> Performer:
    sizes: dict[str, Any] = {"chunk": 4} if options.get("kernel") == "plain_relu" else {"features": 6, "chunk": 4}
    mixer = build_mixer(
        "performer", embed_dim=4, num_heads=2, causal=causal, cross=cross, layer=layer, **(sizes | options)
    )
    assert isinstance(mixer, Performer)
    disturbed(mixer)
    return mixer


def features_of(mixer: Performer, x: Tensor) -> Tensor:
    """φ of x (..., E) as the paper writes it, not stabilised."""
    if mixer.config.kernel == "plain_relu":
        return plain_relu_features(x, mixer.config.epsilon)
    x, directions = x * mixer.dims.head_dim**-0.25, mixer.directions
    if mixer.config.kernel == "relu":
        return relu_features(x, directions, mixer.config.epsilon)
    estimators = {
        "positive": positive_features,
        "hyperbolic": hyperbolic_features,
        "trigonometric": trigonometric_features,
    }
    return estimators[mixer.config.kernel](x, directions)


def definition(mixer: Performer, x: Tensor, source: Tensor, mask: Mask | None, source_mask: Mask | None) -> Tensor:
    q, k, v = qkv(mixer, x, source)
    q, k = features_of(mixer, q), features_of(mixer, k)
    out = []
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            keys = [
                j for j in range(source.shape[1]) if is_valid(source_mask, b, j) and (j <= i or not mixer.dims.causal)
            ]
            weights = torch.einsum("hm,nhm->nh", q[b, i], k[b, keys])
            mixed = torch.einsum("nh,nhe->he", weights / weights.sum(0), v[b, keys])
            out.append(mixed if keys else torch.zeros_like(v[b, 0]))
    return finish(mixer, torch.stack(out).unflatten(0, x.shape[:2]), mask)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
@given(length=st.sampled_from([1, 2, 5, 9, 13]), data=st.data())
def test_it_equals_the_definition(causal: bool, kernel: str, length: int, data: st.DataObject) -> None:
    mixer, mask = performer(causal=causal, kernel=kernel), data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    if kernel == "trigonometric":  # whose weights may nearly cancel, where no two ways of adding agree
        x = (0.3 * x).detach().requires_grad_()
    assert_same_values_and_gradients(
        mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, x, mask, mask), [x]
    )


@pytest.mark.parametrize("kernel", KERNELS)
@given(pieces=st.lists(st.integers(1, 6), min_size=1, max_size=4), data=st.data())
def test_a_stream_in_pieces_equals_the_definition(kernel: str, pieces: list[int], data: st.DataObject) -> None:
    mixer, mask = performer(causal=True, kernel=kernel), data.draw(masks(2, sum(pieces), segments=False))
    x = torch.randn(2, sum(pieces), 4, dtype=torch.float64)
    x = (0.3 * x if kernel == "trigonometric" else x).requires_grad_()  # whose weights may nearly cancel
    assert_same_values_and_gradients(
        mixer, lambda: streamed(mixer, x, mask, pieces), lambda: definition(mixer, x, x, mask, mask), [x]
    )


@pytest.mark.parametrize("kernel", ["positive", "relu", "plain_relu"])
@given(length=st.sampled_from([1, 6]), source_length=st.sampled_from([1, 5]), data=st.data())
def test_cross_attention_equals_the_definition(
    kernel: str, length: int, source_length: int, data: st.DataObject
) -> None:
    mixer = performer(cross=True, kernel=kernel)
    assert_cross_equals_definition(mixer, definition, length, source_length, data)


@pytest.mark.parametrize("kernel", ["relu", "plain_relu"])
def test_kernels_of_relu_keep_every_claim_of_the_contract(kernel: str) -> None:
    results = run_probes(mixer_config("performer", kernel=kernel), make_dims(embed_dim=8, num_heads=2, causal=True))
    assert not [f"{result.name}: {result.detail}" for result in results if not result.passed]


def test_another_epsilon_gives_the_relu_kernel_whose_products_are_divided_by_the_root_of_their_number() -> None:
    epsilon, features, width = 0.1, 6, 2
    mixer = performer(kernel="relu", features=features, epsilon=epsilon * features**0.5 * width**-0.25)
    x = torch.randn(1, 9, 4, dtype=torch.float64)
    q, k, v = qkv(mixer, x, x)
    q, k = ((x @ mixer.directions.mT / features**0.5).relu() + epsilon for x in (q, k))
    weights = torch.einsum("bihm,bjhm->bhij", q, k)
    out = torch.einsum("bhij,bjhe->bihe", weights / weights.sum(dim=3, keepdim=True), v)
    torch.testing.assert_close(mixer(x).y, finish(mixer, out, None), rtol=1e-10, atol=1e-10)


def test_without_directions_nothing_random_is_left() -> None:
    one, other = performer(kernel="plain_relu"), performer(kernel="plain_relu", layer=1)
    assert not one.directions.numel()
    other.load_state_dict(one.state_dict())
    x = torch.randn(1, 9, 4, dtype=torch.float64)
    assert torch.equal(one(x).y, other(x).y)


@given(chunk=st.integers(1, 20), length=st.integers(1, 17))
def test_the_chunk_changes_nothing_but_speed(chunk: int, length: int) -> None:
    one, other = performer(causal=True, chunk=1), performer(causal=True, chunk=chunk)
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, length, 4, dtype=torch.float64)
    torch.testing.assert_close(one(x).y, other(x).y, rtol=1e-10, atol=1e-10)


def test_an_empty_context_gives_finite_gradients() -> None:
    mixer = performer(cross=True).float()
    x, source = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True)
    mixer(x, source, context_mask=Mask.from_lengths([0, 5], 5)).y.sum().mul(1e6).backward()
    assert all(bool(p.grad.isfinite().all()) for p in mixer.parameters() if p.grad is not None)
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


class TestCausality:
    """What the official causal form gets wrong: its maximum and its ε see the whole sequence."""

    def test_a_huge_key_in_the_future_changes_not_one_bit_of_what_came_before(self) -> None:
        """In float32, where a shift by the future maximum leaves 0 / 0; the key stands in the same chunk."""
        mixer, x = performer(causal=True, chunk=16).float(), torch.randn(2, 11, 4)
        y = mixer(x).y
        for size in (1e2, 1e4, 1e8):
            changed = torch.cat((x[:, :-1], size * x[:, -1:].sign()), dim=1)
            torch.testing.assert_close(mixer(changed).y[:, :-1], y[:, :-1], rtol=0, atol=0)

    def test_the_first_token_attends_to_itself_alone_however_large_it_is(self) -> None:
        mixer = performer(causal=True).float()
        for size in (1e-3, 1.0, 30.0):
            x = torch.cat((torch.randn(1, 1, 4), size * torch.randn(1, 8, 4)), dim=1)
            expected = mixer.project_out(mixer.project_value(x[:, 0]))
            torch.testing.assert_close(mixer(x).y[:, 0], expected, rtol=1e-4, atol=1e-5)

    def test_no_weight_leaks_through_an_epsilon(self) -> None:
        """Equal values give back that value, to the last digits: weights sum to 1 in every row."""
        mixer = performer(causal=True)
        x = torch.randn(1, 40, 4, dtype=torch.float64)
        with torch.no_grad():
            mixer.project_value.weight.zero_()
        expected = mixer.project_out(mixer.project_value(x))
        torch.testing.assert_close(mixer(x).y, expected, rtol=1e-12, atol=1e-12)

    def test_the_last_row_is_that_of_the_bidirectional_form(self) -> None:
        causal, both = performer(causal=True), performer()
        both.load_state_dict(causal.state_dict())
        x = 3 * torch.randn(2, 30, 4, dtype=torch.float64)
        torch.testing.assert_close(causal(x).y[:, -1], both(x).y[:, -1], rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_sums_rise_and_are_carried_over_calls_without_overflow(self, dtype: torch.dtype) -> None:
        """Keys that grow a thousandfold: references rise in every chunk, and the state hands them on."""
        mixer = performer(causal=True).to(dtype)
        growth = torch.logspace(-2, 1, 50, dtype=dtype)[:, None]
        x = growth * torch.randn(2, 50, 4, dtype=dtype)
        y, state, pieces = mixer(x).y, mixer.init_state(2), []
        for part in x.split([7, 1, 20, 22], dim=1):
            piece, state, _ = mixer(part, state=state)
            pieces.append(piece)
        assert isinstance(state, FeatureSums)
        assert bool(y.isfinite().all())
        tolerance = 1e-10 if dtype == torch.float64 else 1e-3
        torch.testing.assert_close(torch.cat(pieces, dim=1), y, rtol=tolerance, atol=tolerance)
        assert bool((state.values.isfinite() & (state.values.abs() < 1e4)).all())


@torch.no_grad()
def error_against_softmax(features: int, kernel: str = "positive", *, causal: bool = False) -> float:
    """Relative error of the output, mean over 20 layers' features, at small inputs."""
    torch.manual_seed(0)
    dense = build_mixer("full", embed_dim=16, num_heads=2, causal=causal).double()
    x = 0.25 * torch.randn(1, 64, 16, dtype=torch.float64)
    expected, errors = dense(x).y, []
    for layer in range(20):
        options: dict[str, Any] = {"features": features, "kernel": kernel, "causal": causal, "layer": layer}
        mixer = build_mixer("performer", embed_dim=16, num_heads=2, **options).double()
        mixer.load_state_dict(mixer.state_dict() | dense.state_dict())
        errors.append(float((mixer(x).y - expected).norm() / expected.norm()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("kernel", ["positive", "hyperbolic", "trigonometric"])
def test_the_error_falls_like_the_root_of_the_number_of_features(kernel: str) -> None:
    few, many = error_against_softmax(32, kernel), error_against_softmax(512, kernel)
    assert 2.5 < few / many < 6.5  # the root of 16 is 4
    assert many < 0.1


def test_causal_attention_approximates_causal_softmax() -> None:
    assert error_against_softmax(512, causal=True) < 0.1


class TestDraws:
    """Directions are a function of (seed, layer, draw), and new draws happen in training alone."""

    def test_features_are_drawn_from_seed_and_layer_and_saved(self) -> None:
        assert torch.equal(performer().directions, performer().directions)
        assert not torch.equal(performer().directions, performer(layer=1).directions)
        assert not torch.equal(performer().directions, performer(seed=1).directions)
        assert performer().state_dict().keys() >= {"directions", "training_calls"}

    def test_they_are_drawn_anew_after_every_so_many_training_calls(self) -> None:
        mixer, other = performer(redraw=3).train(), performer(redraw=3).train()
        x, seen = torch.randn(1, 5, 4, dtype=torch.float64), []
        for _ in range(7):
            mixer(x)
            seen.append(mixer.directions)
        changes = [not torch.equal(one, next_one) for one, next_one in pairwise(seen)]
        assert changes == [False, False, True, False, False, True]
        for _ in range(7):
            other(x)
        assert torch.equal(other.directions, mixer.directions)

    def test_a_saved_model_goes_on_where_it_was(self) -> None:
        mixer, x = performer(redraw=2).train(), torch.randn(1, 5, 4, dtype=torch.float64)
        for _ in range(3):
            mixer(x)
        loaded = performer(redraw=2)
        loaded.load_state_dict(mixer.state_dict())
        for _ in range(4):
            torch.testing.assert_close(loaded.train()(x).y, mixer(x).y, rtol=0, atol=0)
        assert torch.equal(loaded.directions, mixer.directions)

    def test_evaluation_and_generation_keep_them(self) -> None:
        mixer, x = performer(redraw=1, causal=True), torch.randn(1, 5, 4, dtype=torch.float64)
        before = copy.deepcopy(mixer.state_dict())
        for _ in range(3):
            mixer.eval()(x)
            mixer.train()(x, state=mixer.init_state(1))
        assert all(torch.equal(value, before[name]) for name, value in mixer.state_dict().items())

    def test_a_new_draw_leaves_an_earlier_graph_alone(self) -> None:
        mixer, x = performer(redraw=1).train(), torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
        expected = torch.autograd.grad(mixer(x).y.sum(), x)[0]
        mixer.training_calls.zero_()
        mixer.directions = performer().directions
        y = mixer(x).y
        for _ in range(2):
            mixer(x)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected, rtol=0, atol=0)

    @pytest.mark.parametrize("directions", ["orthogonal", "independent"])
    def test_directions_are_as_asked(self, directions: str) -> None:
        drawn = performer(directions=directions, features=2, norms="constant").directions
        assert abs(float(drawn[0] @ drawn[1])) < 1e-10 or directions == "independent"
        torch.testing.assert_close(drawn.norm(dim=1), torch.full((2,), 2**0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 0}, "performer: features must be at least 1, got 0"),
        ({"chunk": 0}, "performer: chunk must be at least 1, got 0"),
        ({"redraw": -1}, "performer: redraw must be at least 0, got -1"),
        ({"epsilon": -1.0}, "performer: epsilon must be at least 0, got -1.0"),
        ({"seed": -1}, "performer: seed must be at least 0, got -1"),
        ({"norms": "unit"}, "option 'norms' must be one of 'random', 'constant', got 'unit'"),
        (
            {"kernel": "plain_relu", "features": 64, "redraw": 10},
            "performer: kernel='plain_relu' draws no directions, its features are the head_dim channels themselves; "
            "leave out features, redraw, or choose kernel='relu', which projects",
        ),
        ({"kernel": "plain_relu", "seed": 1}, "leave out seed, or"),
        ({"kernel": "hyperbolic", "features": 7}, "so features must be even; got 7, use 6 or 8"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        performer(**options)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_recomputes_with_the_features_of_its_forward_pass(reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        mixer = build_mixer("performer", embed_dim=16, num_heads=2, features=8, redraw=1).double().train()
        x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
        for _ in range(3):
            y = (
                checkpoint(lambda x, mixer=mixer: mixer(x).y, x, use_reentrant=reentrant)
                if checkpointed
                else mixer(x).y
            )
            assert isinstance(y, Tensor)
            y.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
