"""Sparse-MLP: mixtures of experts along tokens and along channels, restated item by item; what it is in its limits."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_same_values_and_gradients, is_valid, masks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from subquad import Mask, receipts
from subquad.build import build_mixer, cost, make_dims
from subquad.layers import routed_experts
from subquad.layers.routed_experts import RoutedExperts
from subquad.mechanisms.mlp_mixer import MlpMixer, MlpMixerConfig
from subquad.mechanisms.sparse_mlp import SparseMlp, SparseMlpConfig
from subquad.ops.experts.noisy_routing import importance_load_loss_by_items

LONGEST = 8
REPRESENT = st.sampled_from(["tokens", "block", "none"])


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    token_experts, experts = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return {
        "represent": draw(REPRESENT),
        "token_experts": token_experts,
        "token_top_k": draw(st.integers(1, token_experts)),
        "experts": experts,
        "top_k": draw(st.integers(1, experts)),
        "token_hidden_dim": draw(st.sampled_from([None, 5])),
        "represented_length": draw(st.sampled_from([None, 5])),
        "represented_dim": draw(st.sampled_from([None, 3])),
        "capacity_factor": draw(st.sampled_from([None, 0.5, 1.0])),
        "priority": draw(st.sampled_from(["score", "order"])),
        "group": draw(st.sampled_from(["batch", "sequence"])),
    }


def sparse_mlp(**given_options: Any) -> SparseMlp:
    """In float64, with no parameter at 0 or 1."""
    mixer = SparseMlp(
        SparseMlpConfig(**given_options), make_dims(embed_dim=4, num_heads=2, max_length=LONGEST)
    ).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return mixer


class Item(NamedTuple):
    """Something that is routed: whose it is, its place there, and itself."""

    example: int
    place: int
    x: Tensor


def routed(
    module: RoutedExperts, items: list[Item], noise: dict[tuple[int, int], Tensor]
) -> tuple[dict[Any, Tensor], list[Tensor]]:
    """One item after the other takes its experts: results by example and place, and the losses of groups."""
    routing, experts, results, losses = module.routing, module.experts, {}, []
    groups = [items]
    if routing.group == "sequence":
        groups = [[item for item in items if item.example == b] for b in sorted({item.example for item in items})]
    for group in groups:
        logits = [module.router[:, : len(item.x)] @ item.x for item in group]
        noisy = [logit + noise.get(item[:2], torch.zeros(())) for logit, item in zip(logits, group, strict=True)]
        probabilities = [logit.softmax(dim=0) for logit in noisy]
        seats = math.inf
        if routing.capacity_factor is not None:
            seats = max(1, math.floor(routing.top_k * len(group) / routing.experts * routing.capacity_factor))
        turns = list(range(len(group)))
        if routing.priority == "score":
            turns.sort(key=lambda n: -float(probabilities[n].detach().max()))
        taken: Counter[int] = Counter()
        for n in turns:
            x, y = group[n].x, torch.zeros_like(group[n].x)
            for expert in probabilities[n].topk(routing.top_k).indices.tolist():
                if taken[expert] >= seats:
                    continue
                taken[expert] += 1
                hidden = F.gelu(experts.expand[expert][:, : len(x)] @ x + experts.expand_bias[expert])
                out = experts.contract[expert][: len(x)] @ hidden + experts.contract_bias[expert][: len(x)]
                y = y + probabilities[n][expert] * out
            results[group[n][:2]] = y
        if group:
            losses.append(
                importance_load_loss_by_items(torch.stack(logits)[None], torch.stack(noisy)[None], routing.top_k)
            )
    return results, losses


class Told(NamedTuple):
    """y (B, L, D), and the loss."""

    y: Tensor
    loss: Tensor


def definition(mixer: SparseMlp, x: Tensor, mask: Mask | None, noise: tuple[Any, Any] = ({}, {})) -> Told:
    """Sequence by sequence without its padding, filled up with zeros to the longest length."""
    represent, layers = mixer.config.represent, mixer.representation
    places = [[i for i in range(x.shape[1]) if is_valid(mask, b, i)] for b in range(len(x))]
    real = [b for b in range(len(x)) if places[b]]
    streams = {b: x[b, places[b]] for b in real}
    if represent == "block":
        assert layers is not None
        streams = {b: enter(layers, stream) for b, stream in streams.items()}
    normed = {b: mixer.token_norm(stream) for b, stream in streams.items()}
    if represent == "tokens":
        assert layers is not None
        normed = {b: enter(layers, stream) for b, stream in normed.items()}
    elif represent == "none":
        normed = {b: F.pad(stream, (0, 0, 0, LONGEST - len(stream))) for b, stream in normed.items()}
    channels = [Item(b, c, normed[b][:, c]) for b in real for c in range(normed[b].shape[1])]
    results, first_losses = routed(mixer.token_experts, channels, noise[0])
    mixed = {b: torch.stack([results[b, c] for c in range(normed[b].shape[1])], dim=1) for b in real}
    if represent == "tokens":
        assert layers is not None
        mixed = {b: leave(layers, columns) for b, columns in mixed.items()}
    u = {b: streams[b] + mixed[b][: len(streams[b])] for b in real}
    tokens = [Item(b, t, mixer.channel_norm(u[b][t])) for b in real for t in range(len(u[b]))]
    results, second_losses = routed(mixer.channel_experts, tokens, noise[1])
    y = {b: u[b] + torch.stack([results[b, t] for t in range(len(u[b]))]) for b in real}
    if represent == "block":
        assert layers is not None
        y = {b: leave(layers, rows) for b, rows in y.items()}
    spread = [0 * example for example in x]
    for b in real:
        spread[b] = spread[b].index_put((torch.tensor(places[b]),), y[b][: len(places[b])])
    losses = [torch.stack(part).mean() for part in (first_losses, second_losses) if part]
    loss = mixer.config.balance_weight * torch.stack(losses).sum() if losses else x.new_zeros(())
    return Told(torch.stack(spread), loss)


def enter(layers: Any, stream: Tensor) -> Tensor:
    """R of one sequence (L, D): (S₁, D₁)."""
    narrow = F.pad(layers.enter_channels(stream), (0, 0, 0, LONGEST - len(stream)))
    return layers.enter_tokens(narrow.T).T


def leave(layers: Any, rows: Tensor) -> Tensor:
    """R' of (S₁, D₁): (max_length, D)."""
    return layers.leave_channels(layers.leave_tokens(rows.T).T)


@given(chosen=options(), length=st.sampled_from([1, 2, 5, LONGEST]), data=st.data())
def test_it_equals_the_definition(chosen: dict[str, Any], length: int, data: st.DataObject) -> None:
    mixer, mask = sparse_mlp(**chosen).eval(), data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask).y, [x])


@given(chosen=options(), length=st.sampled_from([1, 5, LONGEST]), data=st.data())
def test_in_training_it_equals_the_definition_with_the_same_noise_and_so_does_the_loss(
    chosen: dict[str, Any], length: int, data: st.DataObject
) -> None:
    mixer, mask = sparse_mlp(**chosen, balance_weight=3.0), data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    drawn: list[Tensor] = []

    def remember(logits: Tensor) -> Tensor:
        drawn.append(0.5 * torch.randn(logits.shape, dtype=logits.dtype))
        return logits + drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routed_experts, "add_noise", remember)
        mixed = mixer(x, mask=mask)
    noise = tuple(by_item(part, len(x)) for part in drawn)
    told = definition(mixer, x, mask, (noise[0], noise[1]))
    assert mixed.aux_loss is not None
    assert mixed.aux_loss.dtype == torch.float32
    torch.testing.assert_close(mixed.y, told.y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixed.aux_loss, told.loss.float())
    leaves, weights = [x, *mixer.parameters()], torch.randn_like(mixed.y)
    found, expected = (
        torch.autograd.grad((y * weights).sum() + loss, leaves, allow_unused=True, materialize_grads=True)
        for y, loss in ((mixed.y, mixed.aux_loss), (told.y, told.loss))
    )
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-9)


def by_item(noise: Tensor, batch: int) -> dict[tuple[int, int], Tensor]:
    """Noise (G, N, X) by example and place."""
    examples = noise.reshape(batch, -1, noise.shape[-1])
    return {(b, n): examples[b, n] for b in range(batch) for n in range(examples.shape[1])}


@pytest.mark.parametrize("represent", ["tokens", "block", "none"])
@pytest.mark.parametrize("length", [LONGEST, 5])
def test_with_one_expert_and_no_other_representation_it_is_mlp_mixer(represent: str, length: int) -> None:
    mixer = sparse_mlp(
        represent=represent, token_experts=1, experts=1, top_k=1, represented_length=LONGEST, represented_dim=4
    ).eval()
    peer = MlpMixer(MlpMixerConfig(), make_dims(embed_dim=4, num_heads=2, max_length=LONGEST)).double()
    with torch.no_grad():
        if mixer.representation is not None:
            for layer in mixer.representation.children():
                assert isinstance(layer, nn.Linear)
                layer.weight.copy_(torch.eye(len(layer.weight)))
                layer.bias.zero_()
        for layer, experts, first in (
            ((peer.gather_tokens, peer.spread_tokens), mixer.token_experts, peer.token_norm),
            ((peer.expand, peer.contract), mixer.channel_experts, peer.channel_norm),
        ):
            layer[0].weight.copy_(experts.experts.expand[0])
            layer[0].bias.copy_(experts.experts.expand_bias[0])
            layer[1].weight.copy_(experts.experts.contract[0])
            layer[1].bias.copy_(experts.experts.contract_bias[0])
            own = mixer.token_norm if first is peer.token_norm else mixer.channel_norm
            first.load_state_dict(own.state_dict())
    x = torch.randn(2, length, 4, dtype=torch.float64)
    if represent == "block":  # it represents what is missing as well, and norms that
        x = torch.cat((x, x.new_zeros(2, LONGEST - length, 4)), dim=1)
        torch.testing.assert_close(mixer(x[:, :length]).y, peer(x).y[:, :length], rtol=1e-10, atol=1e-10)
    else:
        torch.testing.assert_close(mixer(x).y, peer(x).y, rtol=1e-10, atol=1e-10)


def test_equal_experts_of_which_all_are_taken_are_one() -> None:
    several = sparse_mlp(token_experts=3, token_top_k=3, experts=4, top_k=4).eval()
    one = sparse_mlp(token_experts=1, experts=1, top_k=1).eval()
    state = {name: value[:1] if "experts." in name else value for name, value in several.state_dict().items()}
    one.load_state_dict(state)
    with torch.no_grad():
        for name, parameter in several.named_parameters():
            if "experts." in name and not name.endswith("router"):
                parameter.copy_(parameter[:1].expand_as(parameter))
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(several(x).y, one(x).y, rtol=1e-10, atol=1e-10)


def test_noise_is_of_training_alone_and_can_be_left_out() -> None:
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    for noise, moves in ((True, True), (False, False)):
        mixer = sparse_mlp(noise=noise)
        assert torch.equal(mixer(x).y, mixer(x).y) != moves
        assert torch.equal(mixer.eval()(x).y, mixer(x).y)


def test_the_losses_are_added_with_their_weight_in_training_alone() -> None:
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    mixer = sparse_mlp(noise=False, balance_weight=0.5)
    loss = mixer(x).aux_loss
    assert loss is not None
    torch.testing.assert_close(loss, definition(mixer, x, None).loss.float())
    assert mixer.eval()(x).aux_loss is None
    assert sparse_mlp(balance_weight=0.0)(x).aux_loss is None
    assert not SparseMlpConfig(balance_weight=0.0).traits.aux_loss


def test_what_a_full_expert_drops_leaves_a_receipt_and_passes_by_the_residual() -> None:
    mixer = sparse_mlp(represent="none", capacity_factor=1e-9, token_experts=2, experts=2, top_k=1).eval()
    x = torch.randn(1, 7, 4, dtype=torch.float64)
    with receipts() as collected:
        y = mixer(x).y
    dropped = sum(entry.count for entry in collected.entries if entry.where == "sparse_mlp")
    assert 4 - 2 + 7 - 2 <= dropped <= 4 - 1 + 7 - 1  # one seat in every expert that is wanted
    assert int((y == x).all(dim=-1).sum()) == 0  # a channel was mixed, so that every token moved
    with receipts() as collected:
        sparse_mlp().eval()(x)
    assert not collected.entries


def test_without_a_capacity_examples_do_not_meet() -> None:
    mixer, x = sparse_mlp().eval(), torch.randn(3, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(x).y[1:2], mixer(x[1:2]).y, rtol=1e-10, atol=1e-10)


@given(represent=REPRESENT, bias=st.booleans(), length=st.sampled_from([None, 3]), width=st.sampled_from([None, 4]))
def test_the_price_knows_the_parameters_of_every_form(
    represent: Any, bias: bool, length: int | None, width: int | None
) -> None:
    config = SparseMlpConfig(represent=represent, represented_length=length, represented_dim=width)
    dims = make_dims(embed_dim=5, num_heads=1, max_length=9, bias=bias)
    counted = sum(parameter.numel() for parameter in SparseMlp(config, dims).parameters())
    assert config.cost(dims, 9, 4).parameters == counted


def test_twice_the_tokens_and_half_the_channels_are_routed() -> None:
    """A block of the paper's base size on 196 patches: D = 768, S₁ = 392, D₁ = 384."""
    routed_flops = cost("sparse_mlp", length=196, embed_dim=768, num_heads=12, max_length=196).flops
    represent = 2 * 2 * (196 * 768 * 384 + 384 * 196 * 392)
    token_experts = 2 * 384 * 392 * (8 + 2 * 384)
    channel_experts = 2 * 196 * 768 * (8 + 2 * 2 * 3072)
    assert routed_flops == represent + token_experts + channel_experts


@pytest.mark.parametrize(
    ("given_options", "message"),
    [
        ({"token_experts": 0}, "sparse_mlp: token_experts must be at least 1, got 0"),
        ({"experts": 2, "top_k": 3}, "sparse_mlp: top_k must be at least 1 and at most experts=2, got 3"),
        ({"token_top_k": 0}, "sparse_mlp: token_top_k must be at least 1 and at most token_experts=8, got 0"),
        ({"represented_length": 0}, "sparse_mlp: represented_length must be at least 1, got 0"),
        ({"represented_dim": -1}, "sparse_mlp: represented_dim must be at least 1, got -1"),
        ({"capacity_factor": 0.0}, r"sparse_mlp: capacity_factor must be above 0, got 0\.0"),
        ({"balance_weight": -1.0}, r"sparse_mlp: balance_weight must be at least 0, got -1\.0"),
    ],
)
def test_what_makes_no_sense_is_refused(given_options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer("sparse_mlp", embed_dim=4, num_heads=2, max_length=4, **given_options)
