"""Attention to the largest scores, streamed, equals its definition in values and all gradients, ties included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import subquad
from subquad.ops.topk import attention as topk
from subquad.ops.topk.attention import topk_attention, topk_attention_by_pairs

LENGTHS = st.sampled_from([1, 2, 7, 33, 130])


def heads(length: int, key_length: int, *, integer: bool = False, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Small integers tie often, and exactly."""
    q = torch.randn(batch, 3, length, 4, dtype=torch.float64)
    k = torch.randn(batch, 3, key_length, 4, dtype=torch.float64)
    v = torch.randn(batch, 3, key_length, 5, dtype=torch.float64)
    return tuple((tensor.round() if integer else tensor).requires_grad_() for tensor in (q, k, v))  # pyright: ignore[reportReturnType] - three


def assert_it_equals_the_definition(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    out, expected = topk_attention(q, k, v, **options), topk_attention_by_pairs(q, k, v, **options)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(out)
    pairs = (torch.autograd.grad(y, (q, k, v), weights) for y in (out, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@st.composite
def facts(draw: st.DrawFn, length: int, key_length: int) -> dict[str, Any]:
    """Causality, padding and documents, each or none."""
    found: dict[str, Any] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        found["valid"] = torch.rand(2, key_length) < draw(st.sampled_from([0.0, 0.6]))
    if draw(st.booleans()):
        found["segments"], found["key_segments"] = (
            (torch.rand(2, size) < 0.1).long().cumsum(dim=1) for size in (length, key_length)
        )
    if found["causal"] and draw(st.booleans()):
        found["query_offset"] = draw(st.sampled_from([3, torch.tensor([0, 5])]))
    return found


@given(length=LENGTHS, key_length=LENGTHS, top_k=st.sampled_from([1, 3, 8, 200]), integer=st.booleans(), data=st.data())
def test_it_equals_the_definition(length: int, key_length: int, top_k: int, integer: bool, data: st.DataObject) -> None:
    options = data.draw(facts(length, key_length))
    assert_it_equals_the_definition(*heads(length, key_length, integer=integer), top_k=top_k, **options)


@pytest.mark.parametrize("pairs", [1, 300, 2000])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("integer", [False, True])
def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch, pairs: int, causal: bool, integer: bool) -> None:
    monkeypatch.setattr(topk, "SLICE_PAIRS", pairs)
    documents = (torch.rand(2, 41) < 0.1).long().cumsum(dim=1)
    q, k, v = heads(41, 41, integer=integer)
    assert_it_equals_the_definition(q, k, v, top_k=4, causal=causal)
    valid = torch.rand(2, 41) < 0.7
    assert_it_equals_the_definition(
        q, k, v, top_k=4, causal=causal, valid=valid, segments=documents, key_segments=documents
    )


def test_the_product_of_large_matrices_changes_nothing() -> None:
    q, k, v = (torch.randn(1, 1, 600, 64) for _ in range(3))
    expected = topk_attention(q.double(), k.double(), v.double(), top_k=5, causal=True)
    error = (topk_attention(q, k, v, top_k=5, causal=True).double() - expected).norm(dim=-1)
    assert float(error.quantile(0.9)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_inputs_are_computed_wide(dtype: torch.dtype) -> None:
    q, k, v = (tensor.detach().to(dtype).requires_grad_() for tensor in heads(20, 20, integer=True))
    out, expected = (attend(q, k, v, top_k=3, causal=True) for attend in (topk_attention, topk_attention_by_pairs))
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected)
    pairs = (torch.autograd.grad(y.sum(), (q, k, v)) for y in (out, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_does_not_narrow_the_scores() -> None:
    q, k, v = (torch.randn(1, 2, 30, 4) for _ in range(3))
    expected = topk_attention(q, k, v, top_k=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(topk_attention(q, k, v, top_k=3), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("copies", [1, 4])
def test_at_most_twelve_bytes_are_kept_for_each_score(causal: bool, copies: int) -> None:
    """Of so many equal keys all are kept if one is."""
    q, k, v = (torch.randn(1, 2, 256, 8) for _ in range(3))
    k = k[:, :, : 256 // copies].repeat_interleave(copies, dim=2)
    q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = topk_attention(q, k, v, top_k=15 if copies > 1 else 16, causal=causal)  # 15 of 16 tie with the next
    assert sum(kept.values()) <= 4 * q.nbytes + 12 * 2 * 256 * 16
    assert out.requires_grad


def test_a_query_without_keys_gives_zero_and_sends_no_gradient() -> None:
    q, k, v = heads(4, 4)
    out = topk_attention(q, k, v, top_k=2, causal=True, valid=torch.tensor([[False, False, True, True], [False] * 4]))
    assert not out[0, :, :2].any()
    assert not out[1].any()
    of_queries, of_keys, of_values = torch.autograd.grad(out.sum(), (q, k, v))
    assert not of_queries[0, :, :2].any()
    assert not any(bool(gradient[1].any()) for gradient in (of_queries, of_keys, of_values))


def test_without_keys_everything_is_zero() -> None:
    q, k, v = heads(3, 0)
    assert not topk_attention(q, k, v, top_k=2, query_offset=torch.tensor([0, 1]), causal=True).any()


def test_it_is_public() -> None:
    assert subquad.ops.topk_attention is topk_attention


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 3, 4), (2, 3, 4, 4), (2, 3, 4, 4)), {}, r"expected q \(B, H, L, E\), .* got \(2, 3, 4\)"),
        (((2, 3, 4, 4), (2, 3, 5, 4), (2, 3, 4, 4)), {}, r"expected q \(B, H, L, E\)"),
        (((2, 3, 4, 4), (2, 3, 4, 5), (2, 3, 4, 4)), {}, "expected q and k of one width"),
        (((2, 3, 4, 4),) * 3, {"top_k": 0}, "top_k must be at least 1, got 0"),
        (((2, 3, 4, 4),) * 3, {"valid": torch.ones(2, 4)}, r"valid must be bool \(2, 4\), got torch.float32"),
        (((2, 3, 4, 4),) * 3, {"query_offset": torch.ones(3)}, r"query_offset must be an int or \(2,\)"),
        (((2, 3, 4, 4),) * 3, {"segments": torch.ones(2, 4)}, "segments and key_segments go together"),
    ],
)
def test_what_does_not_fit_is_refused(
    shapes: tuple[tuple[int, ...], ...], options: dict[str, object], message: str
) -> None:
    q, k, v = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        topk_attention(q, k, v, **{"top_k": 2, **options})  # pyright: ignore[reportArgumentType] - cases
