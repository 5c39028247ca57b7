"""Explicit Sparse Transformer: softmax over the largest scores after every mask, ties kept, streams continued."""

from __future__ import annotations

import pytest
import torch
from comparison import (
    assert_cross_equals_definition,
    assert_same_values_and_gradients,
    disturbed,
    finish,
    is_valid,
    masks,
    qkv,
    same_document,
    softmax_over,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad import Mask
from subquad.build import build_mixer, cost
from subquad.mechanisms.topk import Topk

LENGTHS = st.sampled_from([1, 2, 5, 11])


def topk(top_k: int = 3, **form: object) -> Topk:
    mixer = build_mixer("topk", embed_dim=4, num_heads=2, top_k=top_k, **form)  # pyright: ignore[reportArgumentType] - forms
    assert isinstance(mixer, Topk)
    disturbed(mixer)
    return mixer


def attend_to_largest(q: Tensor, keys: Tensor, values: Tensor, top_k: int) -> Tensor:
    """One query (H, E) after the other head: those of its keys (N, H, E) whose score is among the largest."""
    heads = []
    for head in range(q.shape[0]):
        scores = keys[:, head] @ q[head]
        kept = scores >= scores.sort(descending=True).values[: min(top_k, len(scores))].min() if len(scores) else []
        cut = slice(head, head + 1)
        heads.append(softmax_over(q[cut], keys[kept, cut], values[kept, cut]))
    return torch.cat(heads)


def definition(
    mixer: Topk, x: Tensor, mask: Mask | None, source: Tensor | None = None, source_mask: Mask | None = None
) -> Tensor:
    q, k, v = qkv(mixer, x, source)
    key_mask = mask if source is None else source_mask
    out = []
    for b in range(q.shape[0]):
        valid = [j for j in range(k.shape[1]) if is_valid(key_mask, b, j)]
        top_k = mixer.config.kept(len(valid))
        rows = []
        for i in range(q.shape[1]):
            keys = [j for j in valid if not mixer.dims.causal or j <= i]
            keys = [j for j in keys if source is not None or same_document(mask, b, i, j)]
            rows.append(attend_to_largest(q[b, i], k[b, keys], v[b, keys], top_k))
        out.append(torch.stack(rows))
    return finish(mixer, torch.stack(out), mask)


@pytest.mark.parametrize("causal", [False, True])
@given(length=LENGTHS, top_k=st.integers(1, 12), data=st.data())
def test_it_equals_the_definition(causal: bool, length: int, top_k: int, data: st.DataObject) -> None:
    mixer, mask = topk(top_k, causal=causal), data.draw(masks(2, length))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@given(length=LENGTHS, source_length=LENGTHS, top_k=st.integers(1, 12), data=st.data())
def test_cross_attention_equals_the_definition(
    length: int, source_length: int, top_k: int, data: st.DataObject
) -> None:
    mixer = topk(top_k, cross=True)

    def of_context(mixer: Topk, x: Tensor, source: Tensor, mask: Mask | None, source_mask: Mask | None) -> Tensor:
        return definition(mixer, x, mask, source, source_mask)

    assert_cross_equals_definition(mixer, of_context, length, source_length, data)


@given(length=LENGTHS, fraction=st.integers(1, 5), data=st.data())
def test_a_share_of_the_length_counts_the_valid_keys(length: int, fraction: int, data: st.DataObject) -> None:
    mixer, mask = topk(1, fraction=fraction), data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@pytest.mark.parametrize("causal", [False, True])
def test_keeping_every_key_is_dense_attention(causal: bool) -> None:
    mixer = topk(9, causal=causal)
    dense = build_mixer("full", embed_dim=4, num_heads=2, causal=causal).double()
    dense.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(x).y, dense(x).y, rtol=1e-10, atol=1e-10)


def test_keys_that_tie_are_all_kept() -> None:
    mixer = topk(1)
    x = torch.randn(1, 1, 4, dtype=torch.float64).expand(1, 5, 4).clone()
    with torch.no_grad():
        mixer.project_key.weight.zero_()  # every score of a query is the same
        x[0, 3] += 1
    v = mixer.project_value(x).mean(dim=1, keepdim=True).expand_as(x)
    torch.testing.assert_close(mixer(x).y, mixer.project_out(v), rtol=1e-10, atol=1e-10)


@given(pieces=st.lists(st.integers(1, 6), min_size=1, max_size=4), top_k=st.integers(1, 6), data=st.data())
def test_a_stream_equals_the_definition_over_the_whole(pieces: list[int], top_k: int, data: st.DataObject) -> None:
    length = sum(pieces)
    mixer, mask = topk(top_k, causal=True), data.draw(masks(2, length)) or Mask()
    x = torch.randn(2, length, 4, dtype=torch.float64)
    state, outputs, start = mixer.init_state(2), [], 0
    for size in pieces:
        cut = slice(start, start + size)
        part = Mask(*(None if fact is None else fact[:, cut] for fact in (mask.valid, mask.segments)))
        y, state, _ = mixer(x[:, cut], mask=part, state=state)
        outputs.append(y)
        start += size
    torch.testing.assert_close(torch.cat(outputs, dim=1), definition(mixer, x, mask), rtol=1e-10, atol=1e-10)


def test_a_share_of_the_length_is_neither_causal_nor_knows_documents() -> None:
    with pytest.raises(ValueError, match="topk: causal=True is not supported with fraction=4; leave out fraction, or "):
        topk(fraction=4, causal=True)
    documents = Mask(segments=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"topk: mask\.segments is not supported"):
        topk(fraction=4)(torch.zeros(1, 3, 4, dtype=torch.float64), mask=documents)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="topk: top_k counts the keys that a query keeps, at least 1; got 0"):
        topk(0)
    with pytest.raises(ValueError, match="topk: fraction=m keeps one of m keys and must be at least 1, got 0"):
        topk(fraction=0)


def test_the_price_of_values_is_that_of_the_kept_ones() -> None:
    def flops(top_k: int, *, causal: bool) -> int:
        return cost("topk", length=10, embed_dim=4, num_heads=2, causal=causal, top_k=top_k).flops

    assert flops(4, causal=False) - flops(3, causal=False) == 2 * 10 * 4
    assert flops(4, causal=True) - flops(3, causal=True) == 2 * 7 * 4  # the first three see three keys at most
    assert flops(12, causal=True) == cost("full", length=10, embed_dim=4, num_heads=2, causal=True).flops
