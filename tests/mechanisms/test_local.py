"""Local attention sees W keys, itself included, or whole blocks, counted in valid tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
    streamed,
)
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from transformers.masking_utils import chunked_causal_mask_function

from subquad import Mask
from subquad.build import build_mixer
from subquad.interface import Dims
from subquad.layers.heads import projection_cost
from subquad.mechanisms.local import Local, LocalConfig, WindowState


def local(*, causal: bool = False, **options: Any) -> Local:
    mixer = build_mixer("local", embed_dim=4, num_heads=2, causal=causal, **options)
    assert isinstance(mixer, Local)
    disturbed(mixer)
    return mixer


def places(x: Tensor, mask: Mask | None) -> list[list[int]]:
    """The place of every token among the valid ones of its document."""
    ranks = [[0] * x.shape[1] for _ in range(x.shape[0])]
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            ranks[b][i] = sum(is_valid(mask, b, j) and same_document(mask, b, i, j) for j in range(i))
    return ranks


def definition(mixer: Local, x: Tensor, mask: Mask | None) -> Tensor:
    config, causal, ranks = mixer.config, mixer.dims.causal, places(x, mask)

    def near(i: int, j: int) -> bool:
        if config.kind == "block":
            distance = i // config.block - j // config.block
            return j <= i and distance <= config.neighbours if causal else abs(distance) <= config.neighbours
        return 0 <= i - j < config.window if causal else abs(i - j) <= (config.window - 1) // 2

    def sees(b: int, i: int, j: int) -> bool:
        return same_document(mask, b, i, j) and is_valid(mask, b, j) and near(ranks[b][i], ranks[b][j])

    return finish(mixer, attend_by_loops(*qkv(mixer, x), sees), mask)


BLOCKS = [(1, 2), (4, 0), (4, 1), (3, 2), (40, 1)]
"""Sizes of blocks and numbers of neighbours."""


@pytest.mark.parametrize("causal", [False, True])
@given(length=st.sampled_from([1, 2, 7, 31, 33]), window=st.sampled_from([1, 3, 7, 101]), data=st.data())
def test_a_window_equals_the_definition(causal: bool, length: int, window: int, data: st.DataObject) -> None:
    mixer, mask = local(window=window, causal=causal), data.draw(masks(2, length))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@pytest.mark.parametrize("causal", [False, True])
@given(length=st.sampled_from([1, 3, 4, 8, 17, 30]), blocks=st.sampled_from(BLOCKS), data=st.data())
def test_blocks_equal_the_definition(causal: bool, length: int, blocks: tuple[int, int], data: st.DataObject) -> None:
    mixer = local(kind="block", block=blocks[0], neighbours=blocks[1], causal=causal)
    mask = data.draw(masks(2, length))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


OPTIONS = st.sampled_from(
    [{"window": window} for window in (1, 2, 4, 9)]
    + [{"kind": "block", "block": block, "neighbours": neighbours} for block, neighbours in BLOCKS]
)


@given(options=OPTIONS, pieces=st.lists(st.integers(1, 20), min_size=1, max_size=4), data=st.data())
@example(options={"window": 9}, pieces=[3, 3, 3, 40], data=None)
@example(options={"kind": "block", "block": 4}, pieces=[3, 3, 3, 4, 8], data=None)
def test_a_stream_equals_the_definition_over_the_whole(
    options: dict[str, Any], pieces: list[int], data: st.DataObject | None
) -> None:
    length = sum(pieces)
    mixer, mask = local(causal=True, **options), None if data is None else data.draw(masks(2, length))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)

    assert_same_values_and_gradients(
        mixer, lambda: streamed(mixer, x, mask, pieces), lambda: definition(mixer, x, mask), [x]
    )


@pytest.mark.parametrize("causal", [False, True])
@given(length=st.integers(0, 40), options=OPTIONS)
def test_the_price_counts_the_visible_pairs(causal: bool, length: int, options: dict[str, Any]) -> None:
    if not causal and options.get("window", 1) % 2 == 0:
        options = {"window": options["window"] + 1}
    config, dims = LocalConfig(**options), Dims(embed_dim=6, num_heads=2, head_dim=5, causal=causal)
    pairs = int(config.grid(causal=causal).pattern.dense(length).sum())
    attention = config.cost(dims, length, 4).flops - projection_cost(dims, length, 4).flops
    assert attention == 2 * 2 * pairs * dims.inner_dim


def test_blocks_without_neighbours_are_those_of_chunked_attention() -> None:
    """Hugging Face's mask of Llama 4, whose chunks begin with the first token that is no padding."""
    peer = chunked_causal_mask_function(4, torch.tensor([0]))
    nowhere, places = torch.tensor(0), torch.arange(11)
    expected = [[bool(peer(nowhere, nowhere, i, j)) for j in places] for i in places]
    pattern = LocalConfig(kind="block", block=4, neighbours=0).grid(causal=True).pattern
    assert pattern.dense(11).tolist() == expected


def test_blocks_of_one_token_are_a_sliding_window() -> None:
    x = torch.randn(2, 12, 4, dtype=torch.float64)
    for causal, window in ((False, 7), (True, 4)):
        blocks, sliding = local(kind="block", block=1, neighbours=3, causal=causal), local(window=window, causal=causal)
        sliding.load_state_dict(blocks.state_dict())
        torch.testing.assert_close(blocks(x).y, sliding(x).y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("causal", "window"), [(False, 5), (True, 5), (True, 4)])
def test_a_token_sees_as_many_keys_as_the_window_holds(causal: bool, window: int) -> None:
    mixer = local(window=window, causal=causal)
    x = torch.randn(1, 20, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x).y[0, 10].sum(), x)
    seen = gradient[0].abs().amax(dim=1).nonzero()[:, 0].tolist()
    assert seen == (list(range(11 - window, 11)) if causal else [8, 9, 10, 11, 12])


def test_a_window_as_long_as_the_sequence_is_dense_attention() -> None:
    x = torch.randn(2, 40, 4, dtype=torch.float64)
    for causal in (False, True):
        mixer, dense = (
            local(window=99, causal=causal),
            build_mixer("full", embed_dim=4, num_heads=2, causal=causal).double(),
        )
        dense.load_state_dict(mixer.state_dict())
        torch.testing.assert_close(mixer(x).y, dense(x).y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_leaves_the_result(side: str) -> None:
    mixer, x, padding = (
        local(window=5),
        torch.randn(1, 9, 4, dtype=torch.float64),
        torch.randn(1, 4, 4, dtype=torch.float64),
    )
    places = slice(4, None) if side == "left" else slice(9)
    valid = torch.zeros(1, 13, dtype=torch.bool)
    valid[:, places] = True
    padded = torch.cat((padding, x) if side == "left" else (x, padding), dim=1)
    torch.testing.assert_close(mixer(padded, mask=Mask(valid)).y[:, places], mixer(x).y, rtol=1e-10, atol=1e-10)


def test_an_even_two_sided_window_is_refused_with_its_neighbours() -> None:
    with pytest.raises(ValueError, match="so it must be odd; got 4, use 3 or 5"):
        build_mixer("local", embed_dim=4, num_heads=2, window=4)
    build_mixer("local", embed_dim=4, num_heads=2, window=4, causal=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "local: window counts the keys a token sees, itself included; got 0"),
        ({"block": 0}, "local: block counts the tokens of a block and must be at least 1; got 0"),
        ({"neighbours": -1}, "local: neighbours counts blocks beside the own one, 0 for none; got -1"),
        ({"kind": "blocks"}, "local: option 'kind' must be one of 'sliding', 'block', got 'blocks'"),
    ],
)
def test_sizes_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer("local", embed_dim=4, num_heads=2, **options)


def test_blocks_may_go_with_a_window_that_they_do_not_use() -> None:
    mixer, other = (local(kind="block", block=3, window=window) for window in (3, 4))
    x = torch.randn(2, 8, 4, dtype=torch.float64)
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other(x).y, mixer(x).y)


def test_the_state_holds_the_newest_tokens_in_its_last_columns() -> None:
    mixer = local(window=4, causal=True)
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


def test_the_state_of_blocks_holds_the_own_block_and_those_before() -> None:
    mixer = local(kind="block", block=4, neighbours=1, causal=True)
    x = torch.randn(1, 10, 4, dtype=torch.float64)
    state = mixer(x, state=mixer.init_state(1)).state
    assert isinstance(state, WindowState)
    assert state.place.tolist() == [2]
    assert state.seen.tolist() == [[True] * 6 + [False]]
    torch.testing.assert_close(state.keys[0, :, :6], qkv(mixer, x)[1].transpose(1, 2)[0, :, 4:])
    assert not state.keys[0, :, 6:].any()


@pytest.mark.parametrize("options", [{"window": 7}, {"kind": "block", "block": 4}])
def test_the_size_of_the_state_is_fixed_and_as_priced(options: dict[str, Any]) -> None:
    mixer = local(causal=True, **options)
    empty = mixer.init_state(1)
    assert isinstance(empty, WindowState)
    state = mixer(torch.randn(1, 99, 4, dtype=torch.float64), state=empty).state
    assert state is not None
    assert state.nbytes == empty.nbytes
    assert mixer.config.cost(mixer.dims, 99, 8).state_bytes == empty.keys.nbytes + empty.values.nbytes


@pytest.mark.parametrize("options", [{"window": 1}, {"kind": "block", "block": 4, "neighbours": 0}])
def test_a_stream_may_begin_with_any_document_where_the_state_holds_no_token(options: dict[str, Any]) -> None:
    mixer, x = local(causal=True, **options), torch.randn(1, 8, 4, dtype=torch.float64)
    documents = torch.full((1, 8), -3)
    state = mixer(x[:, :4], mask=Mask(segments=documents[:, :4]), state=mixer.init_state(1)).state
    y = mixer(x[:, 4:], mask=Mask(segments=documents[:, 4:]), state=state).y
    torch.testing.assert_close(y, mixer(x, mask=Mask(segments=documents)).y[:, 4:], rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"local: segment numbers must not decrease .*; go on from \[-3\]"):
        mixer(x, mask=Mask(segments=documents - 1), state=state)


def test_a_stream_of_documents_does_not_mix_across_calls() -> None:
    mixer, x = local(window=6, causal=True), torch.randn(1, 8, 4, dtype=torch.float64)
    documents = Mask(segments=torch.tensor([[3, 3, 3, 3, 7, 7, 7, 7]]))
    state = mixer(x[:, :4], mask=replace(documents, segments=torch.tensor([[3] * 4])), state=mixer.init_state(1)).state
    y = mixer(x[:, 4:], mask=Mask(segments=torch.tensor([[7] * 4])), state=state).y
    torch.testing.assert_close(y, mixer(x, mask=documents).y[:, 4:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y, mixer(x[:, 4:]).y, rtol=1e-10, atol=1e-10)
