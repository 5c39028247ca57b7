"""Softmax attention over key sets: the fused, sliced form equals the definition, and empty rows give 0."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad.ops import softmax
from subquad.ops.softmax import KeySet, sliced_attention, softmax_attention


def heads(length: int, key_length: int, *, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, 3, length, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(batch, 3, key_length, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(batch, 3, key_length, 5, dtype=torch.float64, requires_grad=True)
    return q, k, v


def assert_same(first: Tensor, second: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(first)
    pairs = (torch.autograd.grad((y * weights).sum(), leaves) for y in (first, second))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_definition_equals_a_loop_over_queries() -> None:
    q, k, v = heads(5, 7)
    visible = torch.rand(2, 1, 5, 7) < 0.6
    out = softmax_attention(q, k, v, visible)
    for b in range(2):
        for i in range(5):
            keys = visible[b, 0, i]
            scores = k[b][:, keys] @ q[b, :, i, :, None] / 2
            expected = (scores.softmax(dim=1) * v[b][:, keys]).sum(dim=1)
            torch.testing.assert_close(out[b, :, i], expected, rtol=1e-12, atol=1e-12)


@st.composite
def key_sets(draw: st.DrawFn, length: int, key_length: int) -> KeySet:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    valid = torch.rand(2, key_length, generator=generator) < 0.7 if draw(st.booleans()) else None
    last = torch.randint(-1, key_length, (2, length), generator=generator) if draw(st.booleans()) else None
    if not draw(st.booleans()):
        return KeySet(valid, last_key=last)
    of_queries, of_keys = (torch.rand(2, size, generator=generator) < 0.3 for size in (length, key_length))
    return KeySet(valid, of_queries.cumsum(dim=1), of_keys.cumsum(dim=1), last)


def visible_by_definition(keys: KeySet, length: int, key_length: int) -> Tensor:
    visible = torch.ones(2, 1, length, key_length, dtype=torch.bool)
    for b in range(2):
        for i in range(length):
            for j in range(key_length):
                seen = keys.key_valid is None or bool(keys.key_valid[b, j])
                if keys.query_segments is not None and keys.key_segments is not None:
                    seen = seen and bool(keys.query_segments[b, i] == keys.key_segments[b, j])
                if keys.last_key is not None:
                    seen = seen and j <= int(keys.last_key[b, i])
                visible[b, 0, i, j] = seen
    return visible


@given(
    length=st.sampled_from([1, 2, 7]),
    key_length=st.sampled_from([1, 3, 8]),
    mask_elements=st.sampled_from([1, 40, 2**21]),
    data=st.data(),
)
def test_slices_of_queries_equal_the_definition(
    length: int, key_length: int, mask_elements: int, data: st.DataObject
) -> None:
    q, k, v = heads(length, key_length)
    keys = data.draw(key_sets(length, key_length))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax, "MASK_ELEMENTS", mask_elements)
        out = sliced_attention(q, k, v, keys)
    expected = softmax_attention(q, k, v, visible_by_definition(keys, length, key_length))
    assert_same(out, expected, (q, k, v))


@given(length=st.integers(1, 9), before=st.integers(0, 4), rows=st.integers(1, 4))
def test_aligned_slices_skip_keys_that_no_query_sees(length: int, before: int, rows: int) -> None:
    q, k, v = heads(length, before + length)
    keys = KeySet(last_key=torch.arange(before, before + length).expand(2, -1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax, "MASK_ELEMENTS", rows * 2 * (before + length))
        out = sliced_attention(q, k, v, keys, aligned=True)
    visible = torch.ones(length, before + length, dtype=torch.bool).tril(diagonal=before)
    assert_same(out, softmax_attention(q, k, v, visible), (q, k, v))


def test_a_row_without_keys_gives_zero_and_sends_no_gradient() -> None:
    q, k, v = heads(3, 4)
    visible = torch.ones(3, 4, dtype=torch.bool)
    visible[1] = False
    for out in (
        softmax_attention(q, k, v, visible),
        sliced_attention(q, k, v, KeySet(last_key=torch.tensor([[3, -1, 3]] * 2))),
    ):
        assert not out[:, :, 1].any()
        gradients = torch.autograd.grad(out[:, :, 1].sum(), (q, k, v), retain_graph=True)
        assert not any(bool(gradient.any()) for gradient in gradients)
        of_queries = torch.autograd.grad(out.sum(), q)[0]
        assert bool(of_queries.isfinite().all())
        assert not of_queries[:, :, 1].any()


def test_narrow_inputs_are_summed_in_float32() -> None:
    q, k = torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16), torch.zeros(1, 1, 4096, 4, dtype=torch.bfloat16)
    v = torch.ones(1, 1, 4096, 4, dtype=torch.bfloat16)
    out = softmax_attention(q, k, v, torch.ones(1, 4096, dtype=torch.bool))
    assert out.dtype == torch.bfloat16
    assert bool((out == 1).all())


def test_no_mask_is_kept_for_the_backward_pass() -> None:
    """Slices are made again; only facts about tokens and the heads themselves are kept."""
    q, k, v = heads(64, 64)
    kept: list[tuple[int, ...]] = []
    keys = KeySet(last_key=torch.arange(64).expand(2, -1))

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        sliced_attention(q, k, v, keys)
    assert kept
    assert not [shape for shape in kept if shape[-2:] == (64, 64)]
