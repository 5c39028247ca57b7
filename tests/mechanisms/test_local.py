"""Windowed attention sees W keys, itself included, counted in valid tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comparison import (
    assert_same_values_and_gradients,
    attend_by_loops,
    disturbed,
    finish,
    is_valid,
    masks,
    qkv,
    same_document,
)
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from subquad import Mask
from subquad.build import build_mixer
from subquad.heads import HeadMixer
from subquad.mechanisms.local import WindowState
from subquad.ops.window import block_size


def local(window: int, *, causal: bool = False) -> HeadMixer:
    mixer = build_mixer("local", embed_dim=4, num_heads=2, causal=causal, window=window)
    assert isinstance(mixer, HeadMixer)
    return disturbed(mixer)


def definition(mixer: HeadMixer, x: Tensor, mask: Mask | None, window: int) -> Tensor:
    valid = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None or mask.valid is None else mask.valid
    ranks = [[sum(row[:i]) for i in range(len(row))] for row in valid.tolist()]

    def sees(b: int, i: int, j: int) -> bool:
        distance = ranks[b][i] - ranks[b][j]
        near = 0 <= distance < window if mixer.dims.causal else abs(distance) <= (window - 1) // 2
        return near and is_valid(mask, b, j) and same_document(mask, b, i, j)

    return finish(mixer, attend_by_loops(*qkv(mixer, x), sees), mask)


@pytest.mark.parametrize("causal", [False, True])
@given(length=st.sampled_from([1, 2, 7, 31, 32, 33, 50]), window=st.sampled_from([1, 3, 7, 101]), data=st.data())
def test_it_equals_the_definition(causal: bool, length: int, window: int, data: st.DataObject) -> None:
    mixer, mask = local(window, causal=causal), data.draw(masks(2, length))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(
        mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask, window), [x]
    )


@given(
    window=st.sampled_from([1, 2, 4, 9]),
    pieces=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    data=st.data(),
)
@example(window=9, pieces=[3, 3, 3, 40], data=None)
def test_a_stream_equals_the_definition_over_the_whole(
    window: int, pieces: list[int], data: st.DataObject | None
) -> None:
    length = sum(pieces)
    mixer, mask = local(window, causal=True), None if data is None else data.draw(masks(2, length))
    x = torch.randn(2, length, 4, dtype=torch.float64)
    state, outputs = mixer.init_state(2), []
    for part, start in zip(pieces, torch.tensor([0, *pieces]).cumsum(0).tolist(), strict=False):
        cut = slice(start, start + part)
        facts = (None, None) if mask is None else (mask.valid, mask.segments)
        part_mask = Mask(*(None if fact is None else fact[:, cut] for fact in facts))
        y, state, _ = mixer(x[:, cut], mask=part_mask, state=state)
        outputs.append(y)
    expected = definition(mixer, x, mask, window)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("causal", "window"), [(False, 5), (True, 5), (True, 4)])
def test_a_token_sees_as_many_keys_as_the_window_holds(causal: bool, window: int) -> None:
    mixer = local(window, causal=causal)
    x = torch.randn(1, 20, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x).y[0, 10].sum(), x)
    seen = gradient[0].abs().amax(dim=1).nonzero()[:, 0].tolist()
    assert seen == (list(range(11 - window, 11)) if causal else [8, 9, 10, 11, 12])


def test_a_window_as_long_as_the_sequence_is_dense_attention() -> None:
    x = torch.randn(2, 40, 4, dtype=torch.float64)
    for causal in (False, True):
        mixer, dense = local(99, causal=causal), build_mixer("full", embed_dim=4, num_heads=2, causal=causal).double()
        dense.load_state_dict(mixer.state_dict())
        torch.testing.assert_close(mixer(x).y, dense(x).y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_leaves_the_result(side: str) -> None:
    mixer, x, padding = local(5), torch.randn(1, 9, 4, dtype=torch.float64), torch.randn(1, 4, 4, dtype=torch.float64)
    places = slice(4, None) if side == "left" else slice(9)
    valid = torch.zeros(1, 13, dtype=torch.bool)
    valid[:, places] = True
    padded = torch.cat((padding, x) if side == "left" else (x, padding), dim=1)
    torch.testing.assert_close(mixer(padded, mask=Mask(valid)).y[:, places], mixer(x).y, rtol=1e-10, atol=1e-10)


def test_an_even_two_sided_window_is_refused_with_its_neighbours() -> None:
    with pytest.raises(ValueError, match="so it must be odd; got 4, use 3 or 5"):
        build_mixer("local", embed_dim=4, num_heads=2, window=4)
    build_mixer("local", embed_dim=4, num_heads=2, window=4, causal=True)


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ValueError, match="local: window counts the keys a token sees, itself included; got 0"):
        build_mixer("local", embed_dim=4, num_heads=2, window=0)


def test_the_state_holds_the_newest_tokens_in_its_last_columns() -> None:
    mixer = local(4, causal=True)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    valid = torch.tensor([[True] * 5, [False, True, False, False, True]])
    state = mixer(x, mask=Mask(valid), state=mixer.init_state(2)).state
    assert isinstance(state, WindowState)
    assert state.keys.shape == (2, 2, 3, 2)
    assert state.length.tolist() == [5, 2]
    k = qkv(mixer, x)[1].transpose(1, 2)
    torch.testing.assert_close(state.keys[0], k[0, :, 2:])
    torch.testing.assert_close(state.keys[1, :, 1:], k[1][:, [1, 4]])
    assert not state.keys[1, :, 0].any()


def test_the_size_of_the_state_is_the_window_whatever_the_stream() -> None:
    mixer = local(7, causal=True)
    empty = mixer.init_state(1)
    state = mixer(torch.randn(1, 99, 4, dtype=torch.float64), state=empty).state
    assert state is not None
    assert state.nbytes == empty.nbytes


@given(left=st.integers(0, 600), right=st.integers(0, 600), length=st.integers(1, 2000))
def test_blocks_are_no_longer_than_the_sequence_and_not_too_long(left: int, right: int, length: int) -> None:
    block = block_size(left, right, length)
    assert 1 <= block <= min(length, 256)


def test_a_stream_of_documents_does_not_mix_across_calls() -> None:
    mixer, x = local(6, causal=True), torch.randn(1, 8, 4, dtype=torch.float64)
    documents = Mask(segments=torch.tensor([[3, 3, 3, 3, 7, 7, 7, 7]]))
    state = mixer(x[:, :4], mask=replace(documents, segments=torch.tensor([[3] * 4])), state=mixer.init_state(1)).state
    y = mixer(x[:, 4:], mask=Mask(segments=torch.tensor([[7] * 4])), state=state).y
    torch.testing.assert_close(y, mixer(x, mask=documents).y[:, 4:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y, mixer(x[:, 4:]).y, rtol=1e-10, atol=1e-10)
