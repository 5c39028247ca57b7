"""Synthesizer: scores made of a token alone or of none, masked as any scores; mixtures; streams."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from comparison import assert_same_values_and_gradients, is_valid, masks, streamed
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad import Mask
from subquad.build import build_mixer
from subquad.layers.cache import KeyValueCache
from subquad.layers.synthesis import COMPONENTS
from subquad.mechanisms import synthesizer as module
from subquad.mechanisms.synthesizer import Synthesizer

KINDS = (*((name,) for name in COMPONENTS), *combinations(COMPONENTS, 2), tuple(COMPONENTS))
LENGTHS = st.sampled_from([1, 2, 6])


def synthesizer(components: tuple[str, ...] = ("random",), *, max_length: int = 11, **form: Any) -> Synthesizer:
    mixer = build_mixer(
        "synthesizer", embed_dim=4, num_heads=2, max_length=max_length, components=components, **form
    ).double()
    assert isinstance(mixer, Synthesizer)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return mixer


def hidden(component: Any, x: Tensor) -> Tensor:
    """The hidden layer of one token x (D,): (H, E)."""
    return component.project_hidden(x).relu().unflatten(-1, (2, -1))


def score(mixer: Synthesizer, name: str, tokens: Tensor, i: int, j: int) -> Tensor:
    """The scores (H,) of query i and key j among the valid tokens (N, D), by one component."""
    part: Any = mixer.components[name]
    if name == "random":
        return part.table.values[:, i, j]
    if name == "factorised_random":
        return (part.of_queries.values[:, i] * part.of_keys.values[:, j]).sum(dim=-1)
    if name == "dot_product":
        q, k = part.project_query(tokens[i]).unflatten(-1, (2, -1)), part.project_key(tokens[j]).unflatten(-1, (2, -1))
        return (q * k).sum(dim=-1) / q.shape[-1] ** 0.5
    if name == "dense":
        outer = part.of_positions
        return (outer.weight[:, j] * hidden(part, tokens[i])).sum(dim=-1) + outer.bias[:, j]
    tiled = part.tiled.weight.shape[1]
    first, second = (
        (layer.weight[:, place] * hidden(part, tokens[i])).sum(dim=-1) + layer.bias[:, place]
        for layer, place in ((part.stretched, j // tiled), (part.tiled, j % tiled))
    )
    return first * second


def definition(mixer: Synthesizer, x: Tensor, mask: Mask | None) -> Tensor:
    """The valid tokens of each example, one after the other."""
    names = mixer.config.components
    alphas = [1.0] * len(names) if mixer.mixing is None else mixer.mixing.softmax(dim=0)
    y = 0.0 * x
    for b in range(x.shape[0]):
        places = [j for j in range(x.shape[1]) if is_valid(mask, b, j)]
        tokens = x[b, places]
        values = mixer.project_value(tokens).unflatten(-1, (2, -1))
        for i, place in enumerate(places):
            keys = range(i + 1 if mixer.dims.causal else len(places))
            parts = [torch.stack([score(mixer, name, tokens, i, j) for j in keys], dim=-1) for name in names]
            weights = sum(alpha * part for alpha, part in zip(alphas, parts, strict=True)).softmax(dim=-1)  # pyright: ignore[reportAttributeAccessIssue] - a sum of tensors
            out = torch.einsum("hn,nhe->he", weights, values[: len(keys)])
            y = y.index_put((torch.tensor(b), torch.tensor(place)), mixer.project_out(out.flatten()))
    return y


@pytest.mark.parametrize("causal", [False, True])
@given(components=st.sampled_from(KINDS), mixing=st.sampled_from(["learned", "sum"]), length=LENGTHS, data=st.data())
def test_it_equals_the_definition(
    causal: bool, components: tuple[str, ...], mixing: str, length: int, data: st.DataObject
) -> None:
    mixer = synthesizer(components, mixing=mixing, causal=causal, rank=3, factor=data.draw(st.sampled_from([None, 2])))
    mask = data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@pytest.mark.parametrize("causal", [False, True])
def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    mixer, x = synthesizer(tuple(COMPONENTS), causal=causal), torch.randn(2, 11, 4, dtype=torch.float64)
    whole = mixer(x).y
    monkeypatch.setattr(module, "SLICE_PAIRS", 100)
    x.requires_grad_()
    torch.testing.assert_close(mixer(x).y, whole, rtol=1e-10, atol=1e-10)
    assert_same_values_and_gradients(mixer, lambda: mixer(x).y, lambda: definition(mixer, x, None), [x])


@given(pieces=st.lists(st.integers(1, 5), min_size=1, max_size=4), components=st.sampled_from(KINDS), data=st.data())
def test_a_stream_equals_the_definition_over_the_whole(
    pieces: list[int], components: tuple[str, ...], data: st.DataObject
) -> None:
    length = sum(pieces)
    mixer = synthesizer(components, causal=True, max_length=20)
    mask = data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(
        mixer, lambda: streamed(mixer, x, mask, pieces), lambda: definition(mixer, x, mask), [x]
    )


@pytest.mark.parametrize("causal", [False, True])
def test_scores_of_zero_average_the_values(causal: bool) -> None:
    mixer, x = synthesizer(causal=causal), torch.randn(2, 7, 4, dtype=torch.float64)
    with torch.no_grad():
        mixer.components["random"].table.values.zero_()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue] - a component
    v = mixer.project_value(x)
    counts = torch.arange(1, 8)[:, None] if causal else 7
    expected = v.cumsum(dim=1) / counts if causal else v.mean(dim=1, keepdim=True).expand_as(v)
    torch.testing.assert_close(mixer(x).y, mixer.project_out(expected), rtol=1e-10, atol=1e-10)


def test_random_scores_of_zero_beside_products_are_dense_attention() -> None:
    mixer = synthesizer(("random", "dot_product"), mixing="sum", causal=True)
    with torch.no_grad():
        mixer.components["random"].table.values.zero_()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue] - a component
    dense = build_mixer("full", embed_dim=4, num_heads=2, causal=True).double()
    own = {name.removeprefix("components.dot_product."): value for name, value in mixer.state_dict().items()}
    dense.load_state_dict({name: own[name] for name in dense.state_dict()})
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(x).y, dense(x).y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("components", [("random",), ("factorised_random",)])
def test_fixed_scores_are_a_function_of_seed_and_layer(components: tuple[str, ...]) -> None:
    def scores(seed: int, layer: int) -> dict[str, Tensor]:
        mixer = build_mixer(
            "synthesizer",
            embed_dim=4,
            num_heads=2,
            max_length=11,
            layer=layer,
            components=components,
            trainable=False,
            seed=seed,
        )
        assert not any("components" in name for name, _ in mixer.named_parameters())
        return {name: value for name, value in mixer.state_dict().items() if "components" in name}

    for name, values in scores(0, 0).items():
        assert torch.equal(values, scores(0, 0)[name])
        assert not torch.equal(values, scores(1, 0)[name])
        assert not torch.equal(values, scores(0, 1)[name])


@pytest.mark.parametrize("components", [("random",), ("factorised_random",)])
def test_random_scores_begin_with_variance_one(components: tuple[str, ...]) -> None:
    mixer: Any = build_mixer("synthesizer", embed_dim=16, num_heads=4, max_length=100, components=components)
    part = mixer.components[components[0]]
    drawn = part.scores(part.prepare(torch.empty(0), module.Places((0,), 100)), torch.empty(1, 4, 100, 0))
    assert 0.8 < float(drawn.detach().std()) < 1.2


def test_a_state_holds_no_keys_without_ordinary_attention() -> None:
    widths = {}
    for components in (("random",), ("random", "dot_product")):
        mixer = synthesizer(components, causal=True)
        state = mixer(torch.randn(1, 3, 4, dtype=torch.float64), state=mixer.init_state(1)).state
        assert isinstance(state, KeyValueCache)
        assert state.values.shape == (1, 2, 3, 2)
        widths[components] = state.keys.shape[3]
    assert widths == {("random",): 0, ("random", "dot_product"): 2}


def test_a_stream_longer_than_max_length_is_refused() -> None:
    mixer, x = synthesizer(causal=True), torch.randn(1, 6, 4, dtype=torch.float64)
    state = mixer(x, state=mixer.init_state(1)).state
    with pytest.raises(ValueError, match="the stream has come to 12 tokens but was built for max_length=11"):
        mixer(x, state=state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": ()}, "components must be one or several different ones, got"),
        ({"components": ("random", "random")}, "components must be one or several different ones, got"),
        ({"components": ("softmax",)}, "option 'components' must be"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"factor": 0}, "factor must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"synthesizer: {message}"):
        build_mixer("synthesizer", embed_dim=4, num_heads=2, max_length=11, **options)
