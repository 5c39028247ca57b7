"""The Star-Transformer: satellites read five keys, then the relay reads all satellites, for some steps."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_same_values_and_gradients, is_valid, masks
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from subquad import Mask
from subquad.build import build_mixer, cost, make_dims
from subquad.mechanisms.star import Attention, Star, StarConfig, Step

CONFIGS = st.builds(
    StarConfig,
    steps=st.integers(1, 3),
    boundary=st.sampled_from(["ring", "zero_key", "mask"]),
    norm=st.sampled_from(["post", "pre_official"]),
    start=st.sampled_from(["token", "mean", "padded_mean"]),
    share_steps=st.booleans(),
)


def star(config: StarConfig) -> Star:
    """In float64, with no parameter at 0 or 1."""
    mixer = Star(config, make_dims(embed_dim=4, num_heads=2, head_dim=3)).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return mixer


def normalise(norm: nn.Module, x: Tensor, epsilon: float) -> Tensor:
    assert isinstance(norm, nn.LayerNorm)
    return (x - x.mean()) / (x.var(correction=0) + epsilon).sqrt() * norm.weight + norm.bias


def read(heads: Attention, query: Tensor, context: list[Tensor], *, zero_keys: int = 0) -> Tensor:
    """What one query (D,) reads from a list of tokens (D,), after projection beside keys and values of 0."""
    tokens = torch.stack(context)
    q, k, v = (
        projection(x).unflatten(-1, (heads.num_heads, -1))
        for projection, x in (
            (heads.project_query, query),
            (heads.project_key, tokens),
            (heads.project_value, tokens),
        )
    )
    weights = (torch.einsum("he,nhe->hn", q, k) / q.shape[-1] ** 0.5).exp()
    total = weights.sum(dim=1) + zero_keys
    return heads.project_out((torch.einsum("hn,nhe->he", weights, v) / total[:, None]).flatten())


def finish(config: StarConfig, finisher: nn.Module, x: Tensor) -> Tensor:
    if config.norm == "pre_official":
        return torch.where(x > 0, x, 0.01 * x)
    assert isinstance(finisher, nn.Sequential)
    return normalise(finisher[1], x.clamp_min(0), 1e-5)


def next_satellites(config: StarConfig, step: Step, now: list[Tensor], embeddings: list[Tensor], relay: Tensor) -> list:
    ring = [normalise(step.read, h, 1e-6) for h in now] if config.norm == "pre_official" else now
    found = []
    for i, query in enumerate(ring):
        turns = config.boundary == "ring" and len(ring) > 1  # a single satellite isn't its own neighbour
        sides = [j % len(ring) if turns else j for j in (i - 1, i + 1)]
        near = [ring[j] for j in sides if 0 <= j < len(ring)]
        zero_keys = 2 - len(near) if config.boundary == "zero_key" else 0
        mixed = read(step.of_satellites, query, [*near, query, embeddings[i], relay], zero_keys=zero_keys)
        found.append(finish(config, step.finish_satellites, mixed))
    return found


def definition(mixer: Star, x: Tensor, mask: Mask | None) -> Tensor:
    config, rows = mixer.config, []
    for b in range(x.shape[0]):
        places = [i for i in range(x.shape[1]) if is_valid(mask, b, i)]
        tokens = [x[b, i] for i in places]
        embeddings = tokens[1:]
        relay = tokens[0] if tokens else torch.zeros_like(x[b, 0])
        if config.start != "token":
            count = len(embeddings) if config.start == "mean" else x.shape[1] - 1
            relay = sum(embeddings, torch.zeros_like(relay)) / max(1, count)
        satellites = embeddings
        for index in range(config.steps):
            step = mixer.steps[0 if config.share_steps else index]
            assert isinstance(step, Step)
            satellites = next_satellites(config, step, satellites, embeddings, relay)
            relay = finish(config, step.finish_relay, read(step.of_relay, relay, [relay, *satellites]))
        results = dict(zip(places, [relay, *satellites], strict=False))
        rows.append(torch.stack([results.get(i, 0 * x[b, i]) for i in range(x.shape[1])]))
    return torch.stack(rows)


@given(config=CONFIGS, length=st.sampled_from([1, 2, 3, 4, 9]), data=st.data())
@example(config=StarConfig(), length=6, data=None)
@example(config=StarConfig(norm="pre_official", boundary="zero_key", start="padded_mean"), length=6, data=None)
@example(config=StarConfig(boundary="mask", start="mean", share_steps=True), length=6, data=None)
def test_it_equals_the_definition(config: StarConfig, length: int, data: st.DataObject | None) -> None:
    mixer, mask = star(config), None if data is None else data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@pytest.mark.parametrize(
    ("boundary", "of_first", "of_last"),
    [("ring", [0, 1, 2, 7], [0, 1, 6, 7]), ("mask", [0, 1, 2], [0, 6, 7]), ("zero_key", [0, 1, 2], [0, 6, 7])],
)
def test_in_one_step_a_satellite_sees_its_neighbours_and_the_relay_and_the_relay_everything(
    boundary: str, of_first: list[int], of_last: list[int]
) -> None:
    mixer = build_mixer("star", embed_dim=4, num_heads=2, steps=1, boundary=boundary).double()
    x = torch.randn(1, 8, 4, dtype=torch.float64, requires_grad=True)
    y = mixer(x).y
    for i, seen in ((0, list(range(8))), (1, of_first), (4, [0, 3, 4, 5]), (7, of_last)):
        (gradient,) = torch.autograd.grad((y[0, i] * torch.randn(4)).sum(), x, retain_graph=True)
        assert gradient[0].abs().amax(dim=1).nonzero()[:, 0].tolist() == seen


@pytest.mark.parametrize("padding", [0, 3])
def test_in_a_ring_a_single_satellite_has_no_neighbours(padding: int) -> None:
    ring, line = star(StarConfig(boundary="ring")), star(StarConfig(boundary="mask"))
    line.load_state_dict(ring.state_dict())
    x = torch.randn(2, 2 + padding, 4, dtype=torch.float64)
    mask = Mask.from_lengths([2, 2 + padding], 2 + padding)
    torch.testing.assert_close(ring(x, mask=mask).y[0], line(x, mask=mask).y[0], rtol=1e-12, atol=1e-12)
    if not padding:
        torch.testing.assert_close(ring(x).y, line(x).y, rtol=1e-12, atol=1e-12)


def test_two_steps_bring_every_token_to_every_satellite() -> None:
    mixer = star(StarConfig(steps=2))
    x = torch.randn(1, 30, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((mixer(x).y[0, 15] * torch.randn(4)).sum(), x)
    assert bool((gradient[0].abs().amax(dim=1) > 0).all())


def test_a_ring_has_no_first_satellite() -> None:
    mixer, x = star(StarConfig()), torch.randn(1, 9, 4, dtype=torch.float64)
    turned = torch.cat((x[:, :1], x[:, 1:].roll(3, dims=1)), dim=1)
    y, y_turned = mixer(x).y, mixer(turned).y
    torch.testing.assert_close(y_turned[:, :1], y[:, :1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y_turned[:, 1:], y[:, 1:].roll(3, dims=1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("start", ["token", "mean"])
def test_the_first_valid_token_is_the_relay_and_padding_is_nobodys_neighbour(start: str) -> None:
    mixer = build_mixer("star", embed_dim=4, num_heads=2, start=start).double()
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    padded, valid = torch.randn(1, 11, 4, dtype=torch.float64), torch.zeros(1, 11, dtype=torch.bool)
    places = [1, 3, 4, 7, 8, 9]
    padded[:, places], valid[:, places] = x, True
    y = mixer(padded, mask=Mask(valid)).y
    torch.testing.assert_close(y[:, places], mixer(x).y, rtol=1e-10, atol=1e-10)


def test_a_mean_over_padding_depends_on_how_much_there_is() -> None:
    mixer, x = star(StarConfig(start="padded_mean")), torch.randn(1, 6, 4, dtype=torch.float64)
    padded = torch.cat((x, torch.zeros(1, 3, 4, dtype=torch.float64)), dim=1)
    y = mixer(padded, mask=Mask.from_lengths([6], 9)).y[:, :6]
    assert (y - mixer(x).y).abs().max() > 1e-3


@given(config=CONFIGS, bias=st.booleans())
def test_the_price_knows_the_parameters_of_every_form(config: StarConfig, bias: bool) -> None:
    dims = make_dims(embed_dim=6, num_heads=2, head_dim=5, bias=bias)
    assert config.cost(dims, 10, 4).parameters == sum(
        parameter.numel() for parameter in Star(config, dims).parameters()
    )


def test_shared_steps_have_the_parameters_of_one_and_the_price_of_all() -> None:
    forms = ((1, True), (3, True), (3, False))
    one, tied, own = (
        cost("star", length=50, embed_dim=8, num_heads=2, steps=steps, share_steps=shared) for steps, shared in forms
    )
    assert (tied.parameters, own.parameters) == (one.parameters, 3 * one.parameters)
    assert tied.flops == own.flops == 3 * one.flops


def test_satellites_cost_five_keys_and_the_relay_one_for_each_token() -> None:
    price, one_more = (cost("star", length=n, embed_dim=8, num_heads=2, steps=1).flops for n in (50, 51))
    projections = 2 * 8 * 8 * (3 + 2 + 1 + 2)  # q, k, v; k, v of the embedding; the result; k, v for the relay
    assert one_more - price == projections + 2 * 2 * 8 * (5 + 1)


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="star: steps must be at least 1, got 0"):
        build_mixer("star", embed_dim=4, num_heads=2, steps=0)
