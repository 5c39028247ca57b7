"""Dense attention is softmax attention over all visible keys, whichever path computes it."""

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
    streamed,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from subquad import Mask
from subquad.build import build_mixer
from subquad.layers.cache import ContextCache, KeyValueCache
from subquad.layers.heads import HeadMixer

LENGTHS = st.sampled_from([1, 2, 5, 11])


def full(**form: object) -> HeadMixer:
    mixer = build_mixer("full", embed_dim=6, num_heads=2, head_dim=4, **form)  # pyright: ignore[reportArgumentType] - forms
    assert isinstance(mixer, HeadMixer)
    return disturbed(mixer)


def definition(mixer: HeadMixer, x: Tensor, mask: Mask | None) -> Tensor:
    def sees(b: int, i: int, j: int) -> bool:
        return is_valid(mask, b, j) and same_document(mask, b, i, j) and (j <= i or not mixer.dims.causal)

    return finish(mixer, attend_by_loops(*qkv(mixer, x), sees), mask)


@pytest.mark.parametrize("causal", [False, True])
@given(length=LENGTHS, data=st.data())
def test_it_equals_the_definition(causal: bool, length: int, data: st.DataObject) -> None:
    mixer, mask = full(causal=causal), data.draw(masks(2, length))
    x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@given(length=LENGTHS, source_length=LENGTHS, data=st.data())
def test_cross_attention_equals_the_definition(length: int, source_length: int, data: st.DataObject) -> None:
    mixer = full(cross=True)
    mask = data.draw(masks(2, length, segments=False)) or Mask()
    source_mask = data.draw(masks(2, source_length, segments=False)) or Mask()
    if data.draw(st.booleans()):
        mask = replace(mask, segments=torch.arange(length).expand(2, -1) // 2)
        source_mask = replace(source_mask, segments=torch.arange(source_length).expand(2, -1) // 3)
    x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    source = torch.randn(2, source_length, 6, dtype=torch.float64, requires_grad=True)

    def sees(b: int, i: int, j: int) -> bool:
        if mask.segments is not None and source_mask.segments is not None:
            return is_valid(source_mask, b, j) and bool(mask.segments[b, i] == source_mask.segments[b, j])
        return is_valid(source_mask, b, j)

    assert_same_values_and_gradients(
        mixer,
        lambda: mixer(x, source, mask=mask, context_mask=source_mask).y,
        lambda: finish(mixer, attend_by_loops(*qkv(mixer, x, source), sees), mask),
        [x, source],
    )


@pytest.mark.parametrize("causal", [False, True])
def test_it_equals_torch_multihead_attention(causal: bool) -> None:
    mixer = build_mixer("full", embed_dim=8, num_heads=2, causal=causal)
    assert isinstance(mixer, HeadMixer)
    mixer = disturbed(mixer)
    peer = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    inputs = (mixer.project_query, mixer.project_key, mixer.project_value)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([layer.weight for layer in inputs]))
        peer.in_proj_bias.copy_(torch.cat([layer.bias for layer in inputs]))
    peer.out_proj.load_state_dict(mixer.project_out.state_dict())
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    mask = Mask.from_lengths([7, 4, 1], 7)
    assert mask.valid is not None
    blocked = ~torch.ones(7, 7, dtype=torch.bool).tril() if causal else None  # there True means blocked
    expected, _ = peer(x, x, x, key_padding_mask=~mask.valid, attn_mask=blocked)
    torch.testing.assert_close(mixer(x, mask=mask).y[mask.valid], expected[mask.valid], rtol=1e-10, atol=1e-10)


def test_rotary_scores_depend_on_distances_alone() -> None:
    mixer = full(positions="rotary", causal=True)
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    packed = mixer(x, mask=Mask(segments=torch.tensor([[0] * 4 + [1] * 5]))).y
    torch.testing.assert_close(packed[:, 4:], mixer(x[:, 4:]).y, rtol=1e-10, atol=1e-10)
    first = mixer(x[:, 4:], state=replace(mixer.init_state(1), length=torch.tensor([0]))).y
    torch.testing.assert_close(first, mixer(x[:, 4:]).y, rtol=1e-10, atol=1e-10)


def test_the_cache_holds_valid_tokens_without_gaps() -> None:
    mixer = full(causal=True)
    valid = torch.tensor([[True, False, True, True], [False, False, True, False]])
    state = mixer(torch.randn(2, 4, 6, dtype=torch.float64), mask=Mask(valid), state=mixer.init_state(2)).state
    assert isinstance(state, KeyValueCache)
    assert state.length.tolist() == [3, 1]
    assert state.keys.shape == (2, 2, 3, 4)
    assert not state.keys[1, :, 1:].any()
    assert bool(state.keys[0].any(dim=(0, 2)).all())


@given(pieces=st.lists(st.integers(1, 6), min_size=1, max_size=4), data=st.data())
def test_a_stream_equals_the_definition_over_the_whole(pieces: list[int], data: st.DataObject) -> None:
    length = sum(pieces)
    mixer, mask = full(causal=True), data.draw(masks(2, length))
    x = torch.randn(2, length, 6, dtype=torch.float64)
    y = streamed(mixer, x, mask, pieces)
    torch.testing.assert_close(y, definition(mixer, x, mask), rtol=1e-10, atol=1e-10)


def test_a_stream_goes_on_after_a_first_call_of_nothing_but_padding() -> None:
    mixer, x = full(causal=True), torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    nothing = mixer(x, mask=Mask(torch.zeros(1, 4, dtype=torch.bool)), state=mixer.init_state(1))
    assert not nothing.y.any()
    y = mixer(x, state=nothing.state).y
    torch.testing.assert_close(y, mixer(x).y, rtol=1e-10, atol=1e-10)
    y.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_a_cache_as_long_as_the_call_is_not_taken_for_it() -> None:
    mixer, x = full(causal=True), torch.randn(2, 5, 6, dtype=torch.float64)
    valid = torch.tensor([[True, True, True, False, False], [False, False, True, True, True]])
    state = mixer(x[:, :2], mask=Mask(valid[:, :2]), state=mixer.init_state(2)).state
    second = mixer(x[:, 2:], mask=Mask(valid[:, 2:]), state=state)
    assert isinstance(second.state, KeyValueCache)
    assert second.state.keys.shape[2] == 3  # columns, as many as this call has tokens, of which row 0 has one valid
    whole = mixer(x, mask=Mask(valid)).y
    torch.testing.assert_close(second.y, whole[:, 2:], rtol=1e-10, atol=1e-10)


def test_the_context_is_projected_once_and_kept() -> None:
    mixer = full(cross=True)
    x, source = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    state = mixer(x, source, context_mask=Mask.from_lengths([5, 2], 5), state=mixer.init_state(2)).state
    assert isinstance(state, ContextCache)
    again = mixer(x, state=state).state
    assert isinstance(again, ContextCache)
    assert again.keys is state.keys
    assert again.length.tolist() == [6, 6]


def test_segments_of_queries_and_context_go_together_with_and_without_a_state() -> None:
    mixer = full(cross=True)
    x, source = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    mask, source_mask = (Mask(segments=torch.zeros(2, size, dtype=torch.int64)) for size in (3, 5))
    for state in (None, mixer.init_state(2)):
        for one_sided in ({"mask": mask}, {"context_mask": source_mask}):
            with pytest.raises(ValueError, match="give both masks segments, or neither"):
                mixer(x, source, state=state, **one_sided)


def test_segments_of_a_stream_do_not_decrease_and_may_begin_anywhere() -> None:
    mixer, x = full(causal=True), torch.randn(1, 3, 6, dtype=torch.float64)
    documents = Mask(segments=torch.tensor([[-4, -4, -2]]))
    state = mixer(x, mask=documents, state=mixer.init_state(1)).state
    with pytest.raises(ValueError, match=r"segment numbers must not decrease along a stream; go on from \[-2\]"):
        mixer(x, mask=documents, state=state)


def test_without_segments_the_last_document_of_a_stream_goes_on() -> None:
    mixer, x = full(causal=True), torch.randn(1, 6, 6, dtype=torch.float64)
    documents = torch.tensor([[0, 0, 1, 1, 1, 1]])
    whole = mixer(x, mask=Mask(segments=documents)).y
    state = mixer(x[:, :3], mask=Mask(segments=documents[:, :3]), state=mixer.init_state(1)).state
    torch.testing.assert_close(mixer(x[:, 3:], state=state).y, whole[:, 3:], rtol=1e-10, atol=1e-10)
