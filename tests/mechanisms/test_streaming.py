"""Attention with sinks equals the paper's cache, which evicts token by token, in one call as in any pieces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from comparison import assert_same_values_and_gradients, disturbed, finish, is_valid, masks, qkv
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from subquad import Mask
from subquad.build import build_mixer, make_dims
from subquad.layers.heads import HeadMixer
from subquad.mechanisms.streaming import Streaming, StreamingConfig, StreamingState
from subquad.ops.rotary import rotate
from subquad.patterns import Causal, Sink, Window

Positions = Literal["none", "rotary"]
LENGTHS = st.sampled_from([1, 2, 5, 11, 33])
SINKS, WINDOWS = st.sampled_from([0, 1, 3]), st.sampled_from([1, 2, 5, 40])


def streaming(config: StreamingConfig, positions: Positions = "rotary") -> Streaming:
    dims = make_dims(embed_dim=4, num_heads=2, head_dim=4, causal=True, positions=positions)
    mixer = disturbed(Streaming(config, dims))
    assert isinstance(mixer, Streaming)
    return mixer


def at_places(x: Tensor, places: list[int], mixer: HeadMixer) -> Tensor:
    """Keys (N, H, E) as they are at these places of the cache."""
    if mixer.dims.positions == "none":
        return x
    return rotate(x.transpose(0, 1)[None], torch.tensor(places)[None])[0].transpose(0, 1)


def read_cache(mixer: Streaming, q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """What the query of the newest token (H, E) reads from the cache, itself included."""
    places = list(range(len(keys)))
    k, v = at_places(torch.stack(keys), places, mixer), torch.stack(values)
    q = at_places(q[None], places[-1:], mixer)[0]
    weights = (torch.einsum("he,nhe->hn", q, k) / q.shape[-1] ** 0.5).exp()
    nothing = 0 if mixer.sink_score is None else mixer.sink_score.exp()
    return torch.einsum("hn,nhe->he", weights, v) / (weights.sum(dim=1) + nothing)[:, None]


def definition(mixer: Streaming, x: Tensor, mask: Mask | None) -> Tensor:
    """Token by token: append, read, and evict all but the first and the last."""
    (q, k, v), rows = qkv(mixer, x), []
    sinks, recent = mixer.config.sinks, mixer.config.window - 1
    for b in range(x.shape[0]):
        keys, values, outputs = [], [], []
        for i in range(x.shape[1]):
            if not is_valid(mask, b, i):
                outputs.append(torch.zeros_like(q[b, i]))
                continue
            keys, values = [*keys, k[b, i]], [*values, v[b, i]]
            outputs.append(read_cache(mixer, q[b, i], keys, values))
            if len(keys) > sinks + recent:
                keys, values = (kept[:sinks] + kept[len(kept) - recent :] for kept in (keys, values))
        rows.append(torch.stack(outputs))
    return finish(mixer, torch.stack(rows), mask)


@pytest.mark.parametrize("positions", ["none", "rotary"])
@given(length=LENGTHS, sinks=SINKS, window=WINDOWS, learned=st.booleans(), data=st.data())
def test_it_equals_the_cache(
    positions: Positions, length: int, sinks: int, window: int, learned: bool, data: st.DataObject
) -> None:
    mixer = streaming(StreamingConfig(sinks=sinks, window=window, learned_sink=learned), positions)
    mask = data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@pytest.mark.parametrize("positions", ["none", "rotary"])
@given(
    sinks=SINKS,
    window=WINDOWS,
    learned=st.booleans(),
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    data=st.data(),
)
@example(sinks=3, window=4, learned=False, pieces=[1] * 12, data=None)
@example(sinks=4, window=3, learned=True, pieces=[4, 4, 4], data=None)
def test_a_stream_equals_the_cache_over_the_whole(
    positions: Positions, sinks: int, window: int, learned: bool, pieces: list[int], data: st.DataObject | None
) -> None:
    mixer = streaming(StreamingConfig(sinks=sinks, window=window, learned_sink=learned), positions)
    length = sum(pieces)
    mask = None if data is None else data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)

    def streamed() -> Tensor:
        state, outputs, start = mixer.init_state(2), [], 0
        for part in pieces:
            cut = slice(start, start + part)
            part_mask = Mask(None if mask is None or mask.valid is None else mask.valid[:, cut])
            y, state, _ = mixer(x[:, cut], mask=part_mask, state=state)
            outputs.append(y)
            start += part
        return torch.cat(outputs, dim=1)

    assert_same_values_and_gradients(mixer, streamed, lambda: definition(mixer, x, mask), [x])


@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_a_token_sees_the_sinks_and_its_window(positions: Positions) -> None:
    mixer = streaming(StreamingConfig(sinks=2, window=4), positions)
    x = torch.randn(1, 20, 4, dtype=torch.float64, requires_grad=True)
    for i, seen in ((1, [0, 1]), (4, [0, 1, 2, 3, 4]), (5, [0, 1, 2, 3, 4, 5]), (15, [0, 1, 12, 13, 14, 15])):
        (gradient,) = torch.autograd.grad(mixer(x).y[0, i].sum(), x)
        assert gradient[0].abs().amax(dim=1).nonzero()[:, 0].tolist() == seen


@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_while_the_cache_holds_everything_it_is_dense_attention_with_ordinary_positions(positions: Positions) -> None:
    mixer = streaming(StreamingConfig(sinks=5, window=15), positions)
    dense = build_mixer("full", embed_dim=4, num_heads=2, head_dim=4, causal=True, positions=positions).double()
    dense.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 21, 4, dtype=torch.float64)
    y, expected = mixer(x).y, dense(x).y
    torch.testing.assert_close(y[:, :20], expected[:, :20], rtol=1e-10, atol=1e-10)
    assert (y[:, 20] - expected[:, 20]).abs().max() > 1e-3


def test_a_stream_of_equal_tokens_is_at_rest_once_the_cache_is_full() -> None:
    mixer = streaming(StreamingConfig(sinks=3, window=6))
    y = mixer(torch.randn(1, 1, 4, dtype=torch.float64).expand(1, 50, 4)).y
    torch.testing.assert_close(y[:, 9:], y[:, 9:10].expand(1, 41, 4), rtol=1e-10, atol=1e-10)


def test_a_learned_sink_far_below_the_scores_changes_nothing_and_far_above_takes_everything() -> None:
    config = StreamingConfig(sinks=2, window=4, learned_sink=True)
    mixer, x = streaming(config), torch.randn(1, 20, 4, dtype=torch.float64)
    plain = Streaming(replace(config, learned_sink=False), mixer.dims).double()
    plain.load_state_dict({name: value for name, value in mixer.state_dict().items() if name != "sink_score"})
    assert mixer.sink_score is not None
    with torch.no_grad():
        mixer.sink_score.fill_(-1e3)
        torch.testing.assert_close(mixer(x).y, plain(x).y, rtol=1e-10, atol=1e-10)
        mixer.sink_score.fill_(1e3)
        torch.testing.assert_close(mixer(x).y, mixer.project_out.bias.expand(1, 20, 4), rtol=1e-10, atol=1e-10)


def test_a_new_learned_sink_is_softmax_off_by_one() -> None:
    mixer = Streaming(StreamingConfig(learned_sink=True), make_dims(embed_dim=8, num_heads=4, causal=True))
    assert mixer.sink_score is not None
    assert mixer.sink_score.tolist() == [0, 0, 0, 0]
    nothing = build_mixer("streaming", embed_dim=8, num_heads=4, causal=True)
    assert not any("sink" in name for name, _ in nothing.named_parameters())


def test_the_state_holds_the_first_and_the_last_keys_before_rotation() -> None:
    mixer = streaming(StreamingConfig(sinks=2, window=4))
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    valid = torch.tensor([[True] * 7, [False, True, False, False, True, True, False]])
    empty = mixer.init_state(2)
    state = mixer(x, mask=Mask(valid), state=empty).state
    assert isinstance(state, StreamingState)
    assert state.length.tolist() == [7, 3]
    assert state.nbytes == empty.nbytes
    k, v = (tensor.transpose(1, 2) for tensor in qkv(mixer, x)[1:])
    for first, last, computed in ((state.sink_keys, state.keys, k), (state.sink_values, state.values, v)):
        torch.testing.assert_close(first[0], computed[0, :, :2])
        torch.testing.assert_close(last[0], computed[0, :, 4:])
        torch.testing.assert_close(first[1], computed[1][:, [1, 4]])
        torch.testing.assert_close(last[1], computed[1][:, [1, 4, 5]])


@given(length=st.integers(0, 40), sinks=SINKS, window=WINDOWS, learned=st.booleans())
def test_the_price_counts_the_visible_pairs_of_the_pattern(length: int, sinks: int, window: int, learned: bool) -> None:
    config = StreamingConfig(sinks=sinks, window=window, learned_sink=learned)
    pairs = int((Causal() & (Window(window - 1, 0) | Sink(sinks))).dense(length).sum())
    for positions in ("none", "rotary"):
        dims = make_dims(embed_dim=4, num_heads=2, head_dim=4, causal=True, positions=positions)
        projections = 4 * 2 * length * 4 * 8
        assert config.cost(dims, length, 4).flops == projections + 2 * 2 * pairs * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sinks": -1}, "streaming: sinks counts the first tokens of a stream, 0 for none; got -1"),
        ({"window": 0}, "streaming: window counts the keys a token sees, itself included; got 0"),
    ],
)
def test_sizes_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer("streaming", embed_dim=4, num_heads=2, causal=True, **options)
