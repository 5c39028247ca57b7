"""Sparse Sinkhorn Attention: blocks sorted by a network, in all ways of putting own and sorted keys together."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from comparison import assert_same_values_and_gradients, disturbed, finish, is_valid, masks, qkv, streamed
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad import Mask
from subquad.build import build_mixer, traits
from subquad.layers.sinkhorn_stream import SinkhornState
from subquad.mechanisms.sinkhorn import Sinkhorn
from subquad.ops.sorted_blocks.sorting import sinkhorn as normalise

OPTIONS = [
    {},
    {"combine": "sum"},
    {"combine": "logits", "iterations": 2, "temperature": 2.0},
    {"sort_cut": 2},
]

CAUSAL_OPTIONS = OPTIONS[:3]


def mixer_with(*, causal: bool = False, **options: Any) -> Sinkhorn:
    chosen = {"block": 3, "max_length": 12, **options}
    mixer = build_mixer("sinkhorn", embed_dim=4, num_heads=2, causal=causal, **chosen)
    assert isinstance(mixer, Sinkhorn)
    disturbed(mixer)
    return mixer.eval()


def definition(mixer: Sinkhorn, x: Tensor, mask: Mask | None) -> Tensor:
    """Over the valid tokens of each example, one query after the other."""
    q, k, v = qkv(mixer, x)
    out = torch.zeros_like(q)
    for b in range(x.shape[0]):
        tokens = [i for i in range(x.shape[1]) if is_valid(mask, b, i)]
        if tokens:
            rows = [
                _attend(mixer, x[b, tokens], q[b, tokens], k[b, tokens], v[b, tokens], i) for i in range(len(tokens))
            ]
            out[b] = out[b].index_put((torch.tensor(tokens),), torch.stack(rows))
    return finish(mixer, out, mask)


def _matrix(mixer: Sinkhorn, x: Tensor) -> Tensor:
    """(H, N, N) for the tokens x (L, D)."""
    block, count = mixer.config.block, -(-len(x) // mixer.config.block)
    rows = []
    for u in range(count):
        seen = x[: u * block + 1] if mixer.dims.causal else x[u * block : (u + 1) * block]
        scores = mixer.score(torch.relu(mixer.describe(seen.sum(dim=0))))
        rows.append(scores.unflatten(0, (mixer.dims.num_heads, -1))[:, :count])
    scores = torch.stack(rows, dim=1) / mixer.config.temperature
    return normalise(scores, mixer.config.iterations, causal=mixer.dims.causal)


def _attend(mixer: Sinkhorn, x: Tensor, q: Tensor, k: Tensor, v: Tensor, i: int) -> Tensor:
    """What query i (of L, H, E) reads."""
    config, matrix = mixer.config, _matrix(mixer, x)
    block, u, length = config.block, i // config.block, len(x)
    blocks, places = range(-(-length // block)), block if length > block or mixer.dims.causal else length

    def mixed(tokens: Tensor, row: int) -> list[Tensor]:
        if mixer.dims.causal and row == 0:
            null = mixer.null_key if tokens is k else mixer.null_value
            assert null is not None
            return [null] * places
        zero = torch.zeros_like(tokens[0])
        at = [[w * block + t for w in blocks if w * block + t < length] for t in range(places)]
        return [sum((matrix[:, row, j // block, None] * tokens[j] for j in js), zero) for js in at]

    if config.sort_cut is not None:
        rows = blocks[: config.sort_cut]
        return _softmax(q[i], [key for r in rows for key in mixed(k, r)], [val for r in rows for val in mixed(v, r)])
    last = i if mixer.dims.causal else length - 1
    own = [j for j in range(u * block, (u + 1) * block) if j <= last]
    own_k, own_v, other_k, other_v = [k[j] for j in own], [v[j] for j in own], mixed(k, u), mixed(v, u)
    if config.combine == "joint":
        return _softmax(q[i], own_k + other_k, own_v + other_v)
    if config.combine == "sum":
        return _softmax(q[i], own_k, own_v) + _softmax(q[i], other_k, other_v)
    seen = len(own) if mixer.dims.causal else places
    missing = [torch.zeros_like(k[0])] * (seen - len(own))
    sums = [
        [a + c for a, c in zip(tokens + missing, others[:seen], strict=True)]
        for tokens, others in ((own_k, other_k), (own_v, other_v))
    ]
    return _softmax(q[i], *sums)


def _softmax(q: Tensor, k: list[Tensor], v: list[Tensor]) -> Tensor:
    weights = torch.stack([(q * key).sum(dim=-1) for key in k]) / q.shape[-1] ** 0.5
    return (weights.softmax(dim=0)[..., None] * torch.stack(v)).sum(dim=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(length=st.sampled_from([1, 2, 3, 4, 8, 12]), data=st.data())
def test_it_equals_the_definition(causal: bool, options: dict[str, Any], length: int, data: st.DataObject) -> None:
    if causal and "sort_cut" in options:
        return
    mixer, mask = mixer_with(causal=causal, **options), data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)

    def masked() -> Tensor:
        return x if mask is None else mask.zero_invalid(x)

    assert_same_values_and_gradients(
        mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, masked(), mask), [x]
    )


@pytest.mark.parametrize("options", [*CAUSAL_OPTIONS, {"block": 1}, {"iterations": 1}, {"block": 40}], ids=str)
@given(pieces=st.lists(st.integers(1, 7), min_size=1, max_size=5), data=st.data())
def test_a_stream_in_pieces_equals_the_definition(
    options: dict[str, Any], pieces: list[int], data: st.DataObject
) -> None:
    """Pieces end inside blocks, at their borders and blocks later; examples are at different places."""
    mixer = mixer_with(causal=True, max_length=35, **options)
    mask = data.draw(masks(2, sum(pieces), segments=False))
    x = torch.randn(2, sum(pieces), 4, dtype=torch.float64, requires_grad=True)

    def masked() -> Tensor:
        return x if mask is None else mask.zero_invalid(x)

    assert_same_values_and_gradients(
        mixer, lambda: streamed(mixer, x, mask, pieces), lambda: definition(mixer, masked(), mask), [x]
    )


@pytest.mark.parametrize("options", CAUSAL_OPTIONS, ids=str)
def test_a_stream_token_by_token_equals_the_definition(options: dict[str, Any]) -> None:
    mixer, x = mixer_with(causal=True, **options), torch.randn(2, 11, 4, dtype=torch.float64)
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[0, :5] = valid[1, 4] = False
    mask = Mask(valid)
    found = streamed(mixer, x, mask, [1] * 11)
    torch.testing.assert_close(found, definition(mixer, mask.zero_invalid(x), mask), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 11, 12])
@pytest.mark.parametrize("options", CAUSAL_OPTIONS, ids=str)
def test_the_price_of_a_state_is_what_it_holds(options: dict[str, Any], length: int) -> None:
    mixer = mixer_with(causal=True, **options)
    state = mixer(torch.randn(1, length, 4, dtype=torch.float64), state=mixer.init_state(1)).state
    assert isinstance(state, SinkhornState)
    assert mixer.config.cost(mixer.dims, length, 8).state_bytes == state.nbytes - state.length.nbytes


def test_invalid_tokens_leave_the_state_as_it_is() -> None:
    mixer, x = mixer_with(causal=True), torch.randn(2, 7, 4, dtype=torch.float64)
    valid = torch.arange(7) < torch.tensor([[7], [0]])
    for first in (mixer.init_state(2), mixer(x, mask=Mask(valid), state=mixer.init_state(2)).state):
        after = mixer(x, mask=Mask(torch.zeros_like(valid)), state=first).state
        for field in fields(SinkhornState):
            assert torch.equal(getattr(after, field.name), getattr(first, field.name))


def test_a_stream_that_begins_draws_the_noise_of_a_call_without_a_state() -> None:
    mixer, x = mixer_with(causal=True, noise=True).train(), torch.randn(2, 12, 4, dtype=torch.float64)
    valid = torch.arange(12) < torch.tensor([[12], [5]])
    before = torch.get_rng_state()
    expected = mixer(x, mask=Mask(valid)).y
    torch.set_rng_state(before)
    assert torch.equal(mixer(x, mask=Mask(valid), state=mixer.init_state(2)).y, expected)


def test_an_open_block_keeps_the_noise_it_was_sorted_with() -> None:
    mixer, x = mixer_with(causal=True, noise=True).train(), torch.randn(2, 12, 4, dtype=torch.float64)
    before = torch.get_rng_state()
    expected = mixer(x).y
    torch.set_rng_state(before)
    torch.testing.assert_close(streamed(mixer, x, None, [10, 2]), expected, rtol=1e-10, atol=1e-10)


def test_a_stream_beyond_the_maximal_length_is_refused() -> None:
    mixer, x = mixer_with(causal=True), torch.zeros(1, 12, 4, dtype=torch.float64)
    state = mixer(x[:, :11], state=mixer.init_state(1)).state
    valid = torch.arange(12)[None] < 1
    state = mixer(x, mask=Mask(valid), state=state).state
    with pytest.raises(ValueError, match="sinkhorn: the stream has come to 13 tokens but was built for max_length=12"):
        mixer(x[:, :1], state=state)


def test_a_cut_has_no_state() -> None:
    assert traits("sinkhorn").state
    assert not traits("sinkhorn", sort_cut=2).state


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_padding_leaves_the_result_wherever_it_stands(causal: bool, options: dict[str, Any]) -> None:
    if causal and "sort_cut" in options:
        return
    mixer, x = mixer_with(causal=causal, **options), torch.randn(1, 6, 4, dtype=torch.float64)
    valid = torch.tensor([[False, True, True, False, True, True, True, False, False, True, False, False]])
    spread = torch.randn(1, 12, 4, dtype=torch.float64)
    spread[valid] = x[0]
    torch.testing.assert_close(mixer(spread, mask=Mask(valid)).y[valid], mixer(x).y[0], rtol=1e-10, atol=1e-10)


def test_noise_is_drawn_from_torchs_generator_in_training_alone() -> None:
    mixer, x = mixer_with(noise=True), torch.randn(1, 12, 4, dtype=torch.float64)
    before = torch.get_rng_state()
    assert torch.equal(mixer(x).y, mixer(x).y)
    assert torch.equal(torch.get_rng_state(), before)
    first, second = mixer.train()(x).y, mixer(x).y
    torch.set_rng_state(before)
    assert torch.equal(mixer(x).y, first)
    assert not torch.allclose(first, second)
    without = mixer_with().train()
    assert torch.equal(without(x).y, without.eval()(x).y)


def test_a_checkpoint_replays_the_noise() -> None:
    mixer, x = mixer_with(noise=True).train(), torch.randn(1, 12, 4, dtype=torch.float64, requires_grad=True)
    state, found = torch.get_rng_state(), []
    for recomputed in (False, True):
        torch.set_rng_state(state)
        y = checkpoint(lambda: mixer(x).y, use_reentrant=False) if recomputed else mixer(x).y
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_cut_has_no_causal_form() -> None:
    with pytest.raises(ValueError, match="sinkhorn: causal=True is not supported"):
        mixer_with(causal=True, sort_cut=2)


def test_longer_input_is_refused() -> None:
    with pytest.raises(ValueError, match="x has length 13 but was built for max_length=12"):
        mixer_with()(torch.zeros(1, 13, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block counts the tokens of a block and must be at least 1; got 0"),
        ({"iterations": 0}, "iterations counts normalisations of the sorting matrix and must be at least 1; got 0"),
        ({"temperature": 0.0}, "temperature must be greater than 0, got 0.0"),
        ({"sort_cut": 0}, "sort_cut counts sorted blocks and must be at least 1, or None; got 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"sinkhorn: {message}"):
        mixer_with(**options)
