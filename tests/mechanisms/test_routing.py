"""The Routing Transformer: clusters by k-means, bidirectional by top members, causal by the last members."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_same_values_and_gradients, disturbed, finish, is_valid, masks, split_heads, streamed
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.utils.checkpoint import checkpoint

from subquad import Mask
from subquad.build import build_mixer
from subquad.mechanisms.routing import Routing, RoutingState
from subquad.ops.clusters import rings
from subquad.ops.rotary import rotate
from subquad.ops.softmax import softmax_attention_with_lse

FORMS: list[dict[str, Any]] = [
    {"causal": False},
    {"causal": False, "shared": True, "scaled": True},
    {"causal": False, "positions": "rotary"},
    {"causal": True},
    {"causal": True, "positions": "rotary", "scaled": True, "epsilon": 0.0},
]


def mixer_with(**options: Any) -> Routing:
    mixer = build_mixer("routing", embed_dim=4, num_heads=2, **{"clusters": 3, "window": 3, **options})
    assert isinstance(mixer, Routing)
    disturbed(mixer)
    return mixer.eval()


def queries_and_keys(mixer: Routing, x: Tensor) -> list[Tensor]:
    """(L, H, E) for x (L, D)."""
    shared = mixer.config.shares(mixer.dims)
    projections = [mixer.project_query, mixer.project_query if shared else mixer.project_key]
    return [layer_norm(split_heads(mixer, one, x), (mixer.dims.head_dim,)) for one in projections]


def definition(mixer: Routing, x: Tensor, mask: Mask | None) -> Tensor:
    """Over the valid tokens of each example, head by head."""
    out = torch.zeros_like(split_heads(mixer, mixer.project_value, x))
    for b in range(x.shape[0]):
        tokens = [i for i in range(x.shape[1]) if is_valid(mask, b, i)]
        if tokens:
            found = [_attend(mixer, x[b, tokens], h) for h in range(mixer.dims.num_heads)]
            out[b] = out[b].index_put((torch.tensor(tokens),), torch.stack(found, dim=1))
    return finish(mixer, out, mask)


def _attend(mixer: Routing, x: Tensor, h: int) -> Tensor:
    config, means = mixer.config, mixer.means[h]
    q, k = (part[:, h] for part in queries_and_keys(mixer, x))
    v = split_heads(mixer, mixer.project_value, x)[:, h]
    by_query, by_key = q @ means.T, k @ means.T
    if mixer.dims.positions == "rotary":
        place = torch.arange(len(x))[None]
        q, k = (rotate(part[None, None], place)[0, 0] for part in (q, k))
    scores = q @ k.T * (mixer.dims.head_dim**-0.5 if config.scaled else 1.0)
    if mixer.dims.causal:
        own = by_query.argmax(dim=1).tolist()
        seen = [[j for j in range(i + 1) if own[j] == own[i]][-config.window :] for i in range(len(x))]
        rows = [scores[i, js].softmax(dim=0) @ v[js] for i, js in enumerate(seen)]
        return torch.stack(rows) / (1 + config.epsilon)
    size = min(config.window, len(x))
    collected: list[list[Tensor]] = [[] for _ in range(len(x))]
    for c in range(config.clusters):
        keys = by_key[:, c].topk(size).indices
        for i in by_query[:, c].topk(size).indices.tolist():
            collected[i].append(scores[i, keys].softmax(dim=0) @ v[keys])
    none = torch.zeros_like(v[0])
    return torch.stack([sum(parts, none) / (len(parts) + config.epsilon) if parts else none for parts in collected])


@pytest.mark.parametrize("options", [*FORMS[3:], {"causal": True, "window": 1}], ids=str)
@given(pieces=st.lists(st.integers(1, 9), min_size=1, max_size=5), data=st.data())
def test_a_stream_in_pieces_equals_the_definition(
    options: dict[str, Any], pieces: list[int], data: st.DataObject
) -> None:
    mixer, mask = mixer_with(**options), data.draw(masks(2, sum(pieces), segments=False))
    x = torch.randn(2, sum(pieces), 4, dtype=torch.float64, requires_grad=True)

    assert_same_values_and_gradients(
        mixer, lambda: streamed(mixer, x, mask, pieces), lambda: definition(mixer, x, mask), [x]
    )


def test_a_long_call_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = mixer_with(causal=True), torch.randn(2, 23, 4, dtype=torch.float64)
    monkeypatch.setattr(rings, "LARGEST_SLICE", 64)
    begun = mixer(x[:, :4], state=mixer.init_state(2))
    torch.testing.assert_close(mixer(x[:, 4:], state=begun.state).y, mixer(x).y[:, 4:], rtol=1e-10, atol=1e-10)


def test_a_state_holds_the_last_members_of_every_cluster() -> None:
    mixer, x = mixer_with(causal=True, window=4), torch.randn(1, 29, 4, dtype=torch.float64)
    state = mixer(x, state=mixer.init_state(1)).state
    assert isinstance(state, RoutingState)
    (q, _), values = queries_and_keys(mixer, x[0]), split_heads(mixer, mixer.project_value, x)[0]
    for head in range(2):
        labels = (q[:, head] @ mixer.means[head].T).argmax(dim=1)
        for cluster in range(3):
            members = (labels == cluster).nonzero()[-3:, 0]
            assert state.members[0, head, cluster] == len(members)
            held = state.values[0, head, cluster, 3 - len(members) :]
            torch.testing.assert_close(held, values[members, head], rtol=1e-12, atol=1e-12)


def test_a_stream_moves_the_centroids_as_its_calls_do_alone() -> None:
    """Training with states learns from the tokens of each call."""
    streamed, alone = mixer_with(causal=True).train(), mixer_with(causal=True).train()
    alone.load_state_dict(streamed.state_dict())
    x = torch.randn(2, 12, 4, dtype=torch.float64)
    state = streamed.init_state(2)
    for part in x.split(4, dim=1):
        _, state, streamed_loss = streamed(part, state=state)
        loss = alone(part).aux_loss
        assert torch.equal(streamed_loss, loss)
    assert torch.equal(streamed.means, alone.means)


@pytest.mark.parametrize("form", FORMS, ids=str)
@given(length=st.sampled_from([1, 2, 3, 4, 11]), data=st.data())
def test_it_equals_the_definition(form: dict[str, Any], length: int, data: st.DataObject) -> None:
    mixer, mask = mixer_with(**form), data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_with_one_centroid_and_a_wide_window_it_is_dense_attention(form: dict[str, Any]) -> None:
    mixer, x = mixer_with(clusters=1, window=20, **form), torch.randn(9, 4, dtype=torch.float64)
    q, k = (part.transpose(0, 1)[None] for part in queries_and_keys(mixer, x))
    if mixer.dims.positions == "rotary":
        q, k = (rotate(part, torch.arange(9)[None]) for part in (q, k))
    visible = torch.ones(9, 9, dtype=torch.bool)
    visible = visible.tril() if mixer.dims.causal else visible
    v = split_heads(mixer, mixer.project_value, x).transpose(0, 1)[None]
    scale = mixer.dims.head_dim**-0.5 if mixer.config.scaled else 1.0
    dense = softmax_attention_with_lse(q, k, v, visible, scale)[0] / (1 + mixer.config.epsilon)
    expected = finish(mixer, dense.transpose(1, 2), None)
    torch.testing.assert_close(mixer(x[None]).y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_padding_leaves_the_result_wherever_it_stands(form: dict[str, Any]) -> None:
    mixer, x = mixer_with(**form), torch.randn(1, 6, 4, dtype=torch.float64)
    valid = torch.tensor([[False, True, True, False, True, True, True, False, False, True]])
    spread = torch.randn(1, 10, 4, dtype=torch.float64)
    spread[valid] = x[0]
    torch.testing.assert_close(mixer(spread, mask=Mask(valid)).y[valid], mixer(x).y[0], rtol=1e-10, atol=1e-10)


def test_the_top_of_the_whole_sequence_would_tell_of_later_tokens() -> None:
    """Why the bidirectional form is not offered with a causal mask: clusters of a prefix are others."""
    mixer, x = mixer_with(shared=True), torch.randn(1, 12, 4, dtype=torch.float64)
    q = torch.stack([part.transpose(0, 1) for part in queries_and_keys(mixer, x[0])[:1]])
    tops = [(q[..., :length, :] @ mixer.means.mT).topk(3, dim=2).indices for length in (6, 12)]
    assert not torch.equal(*tops)


def buffers(mixer: Routing) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in mixer.named_buffers()}


@pytest.mark.parametrize("causal", [False, True])
def test_centroids_move_in_training_alone_and_after_the_call(causal: bool) -> None:
    mixer, x = mixer_with(causal=causal), torch.randn(2, 11, 4, dtype=torch.float64)
    before, y = buffers(mixer), mixer(x).y
    assert all(map(torch.equal, buffers(mixer).values(), before.values()))
    torch.testing.assert_close(mixer.train()(x).y, y, rtol=0, atol=0)
    assert not any(map(torch.equal, buffers(mixer).values(), before.values()))


@pytest.mark.parametrize("causal", [False, True])
def test_the_update_is_that_of_queries_and_keys_without_padding(causal: bool) -> None:
    mixer, x = mixer_with(causal=causal, decay=0.6), torch.randn(2, 7, 4, dtype=torch.float64)
    mask, before = Mask(torch.tensor([[True] * 7, [False, True, False, True, True, False, False]])), buffers(mixer)
    mixer.train()(x, mask=mask)
    assert mask.valid is not None
    counts, sums = 0.6 * before["counts"], 0.6 * before["sums"]
    for part in queries_and_keys(mixer, x[mask.valid])[: 1 if causal else 2]:
        for h in range(2):
            for vector in part[:, h]:
                c = int((before["means"][h] @ vector).argmax())
                counts[h, c] += 0.4
                sums[h, c] += 0.4 * vector.detach()
    torch.testing.assert_close(mixer.counts, counts, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixer.sums, sums, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_batch_of_padding_alone_leaves_centroids_to_go_on_with(decay: float) -> None:
    mixer, x = mixer_with(decay=decay).train(), torch.randn(2, 7, 4, dtype=torch.float64)
    means = mixer.means.clone()
    mixer(x, mask=Mask(torch.zeros(2, 7, dtype=torch.bool)))
    torch.testing.assert_close(mixer.means, means, rtol=1e-4, atol=1e-4)  # to the smoothing of counts
    mixer(x)
    assert bool(mixer.means.isfinite().all())
    assert not torch.allclose(mixer.means, means, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("causal", [False, True])
def test_the_centroids_of_a_bfloat16_module_follow_as_those_of_a_float32_one(causal: bool) -> None:
    """One step of the default decay, towards two clouds, is less than bfloat16 can add to a centroid."""
    narrow, clouds = mixer_with(causal=causal, clusters=2, head_dim=8).bfloat16().train(), torch.randn(2, 1, 4)
    wide, first = copy.deepcopy(narrow).float(), narrow.means.clone()
    for _ in range(100):
        x = (clouds + 0.1 * torch.randn(2, 9, 4)).bfloat16()
        narrow(x)
        wide(x.float())
    assert float((wide.means - first).norm()) > 1
    for name, buffer in buffers(narrow).items():
        torch.testing.assert_close(buffer, buffers(wide)[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_a_checkpointed_step_repeats_its_choices_and_moves_the_centroids_once(causal: bool) -> None:
    x, found = torch.randn(2, 11, 4, dtype=torch.float64, requires_grad=True), []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        mixer = mixer_with(causal=causal, decay=0.1).train()

        def step(x: Tensor, mixer: Routing = mixer) -> Tensor:
            mixed = mixer(x)
            assert mixed.aux_loss is not None
            return mixed.y.square().sum() + mixed.aux_loss

        loss = checkpoint(step, x, use_reentrant=False) if checkpointed else step(x)
        assert isinstance(loss, Tensor)
        found.append([*torch.autograd.grad(loss, [x, *mixer.parameters()]), *buffers(mixer).values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_auxiliary_loss_is_the_weighted_distance_to_the_centroids_before() -> None:
    mixer, x = mixer_with(commitment=0.5).train(), torch.randn(2, 5, 4, dtype=torch.float64)
    means, distances = mixer.means.clone(), []
    for example in x:
        for part in queries_and_keys(mixer, example):
            own = [means[h, (part[:, h] @ means[h].T).argmax(dim=1)] for h in range(2)]
            distances.append(part - torch.stack(own, dim=1))
    loss = mixer(x).aux_loss
    assert loss is not None
    torch.testing.assert_close(loss.double(), 0.5 * torch.cat(distances).square().mean(), rtol=1e-5, atol=1e-6)
    loss.backward()
    assert mixer.project_key.weight.grad is not None
    assert mixer.project_value.weight.grad is None


def test_centroids_are_saved_with_the_model(tmp_path: Path) -> None:
    trained, other = mixer_with().train(), mixer_with(seed=5)
    x = torch.randn(2, 11, 4, dtype=torch.float64)
    trained(x)
    torch.save(trained.state_dict(), tmp_path / "mixer.pt")
    other.load_state_dict(torch.load(tmp_path / "mixer.pt", weights_only=True))
    assert torch.equal(other(x).y, trained.eval()(x).y)


def test_the_first_centroids_are_those_of_seed_and_layer() -> None:
    means = [mixer_with(seed=seed, layer=layer).means for seed, layer in ((0, 1), (0, 1), (1, 1), (0, 2))]
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0], means[2])
    assert not torch.equal(means[0], means[3])


def test_shared_queries_and_keys_have_one_projection() -> None:
    assert not hasattr(mixer_with(causal=True), "project_key")
    assert not hasattr(mixer_with(shared=True), "project_key")
    assert hasattr(mixer_with(), "project_key")


def test_the_causal_form_needs_shared_queries_and_keys() -> None:
    with pytest.raises(ValueError, match="routing: causal=True is not supported"):
        mixer_with(causal=True, shared=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 0}, "clusters must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"epsilon": -0.1}, "epsilon must be at least 0, got -0.1"),
        ({"commitment": -1.0}, "commitment must be at least 0, got -1.0"),
        ({"decay": 1.5}, r"decay must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"routing: {message}"):
        mixer_with(**options)
