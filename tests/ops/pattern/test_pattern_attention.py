"""Pattern attention: the blocked backend equals the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from long_patterns import LONG, assert_backends_agree, heads, triple
from random_patterns import compositions
from torch import Tensor

from subquad import Mask, receipts
from subquad.ops import pattern_attention, pattern_attention_with_lse
from subquad.ops.fused import fused_backward, fused_forward
from subquad.patterns import Block, Causal, Global, Strided, Window

BORDERS = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 400]


@settings(max_examples=150)
@given(length=st.one_of(st.sampled_from(BORDERS), st.integers(1, 400)), data=st.data())
def test_blocked_equals_the_definition_for_any_composition(length: int, data: st.DataObject) -> None:
    pattern = data.draw(compositions(length))
    if not all(pattern.of_head(head).terms() for head in range(2)):
        return  # refused: nothing is ever visible
    facts: list[Tensor | None] = [None, None, None]
    if data.draw(st.booleans()):
        lengths = torch.tensor(data.draw(st.lists(st.integers(0, length), min_size=2, max_size=2)))
        facts[0] = torch.arange(length) < lengths[:, None]
    if data.draw(st.booleans()):
        facts[1] = (torch.rand(2, length) < 0.1).long().cumsum(dim=1)
    if data.draw(st.booleans()):
        facts[2] = torch.rand(2, length) < 0.05
    q, k, v = triple(length, batch=2)
    assert_backends_agree(q, k, v, pattern, mask=Mask(*facts))


@settings(max_examples=60)
@given(length=st.integers(1, 70), before=st.integers(0, 90), data=st.data())
def test_queries_may_start_at_any_position(length: int, before: int, data: st.DataObject) -> None:
    pattern = data.draw(compositions(before + length))
    if not all(pattern.of_head(head).terms() for head in range(2)):
        return
    q, k, v = heads(length, batch=2), heads(before + length, batch=2), heads(before + length, batch=2)
    offsets = data.draw(st.one_of(st.just(before), st.lists(st.integers(0, before), min_size=2, max_size=2)))
    query_offset = torch.tensor(offsets) if isinstance(offsets, list) else offsets
    assert_backends_agree(q, k, v, pattern, query_offset=query_offset, key_valid=torch.rand(2, before + length) < 0.8)


@pytest.mark.parametrize("length", [700, 1100])
@pytest.mark.parametrize("name", LONG)
def test_blocked_equals_the_definition_where_strips_and_tiles_run(name: str, length: int) -> None:
    pattern = LONG[name] if length > 700 or name != "longformer" else Window(64, 64) | Global([0, 699])
    with receipts() as collected:
        assert_backends_agree(*triple(length), pattern)
    assert length < 1000 or not collected.entries


@pytest.mark.parametrize("length", [720, 760, 1500], ids=["as they are", "narrowed", "made anew"])
def test_dense_slices_equal_the_definition_however_their_masks_are_remembered(length: int) -> None:
    q, k, v = triple(length)
    for _ in range(2):
        assert_backends_agree(q, k, v, ~Strided(2))


@pytest.mark.parametrize("length", [1088, 1100])
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_by_products_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, name: str, padded: bool, length: int
) -> None:
    monkeypatch.setattr("subquad.ops.pattern.strip_piece.unfused_pays", lambda rows, columns, like: True)
    monkeypatch.setattr("subquad.ops.pattern.strip_piece.MOST_JOINED_PAIRS", 4.0)
    mask = Mask(torch.arange(length) < torch.tensor([[length - 200]])) if padded else None
    assert_backends_agree(*triple(length), LONG[name], mask=mask)


@pytest.mark.parametrize("query_offset", [0, 100])
@pytest.mark.parametrize("by_products", [False, True])
def test_stairs_equal_the_definition_whether_or_not_they_share_a_mask(
    monkeypatch: pytest.MonkeyPatch, query_offset: int, by_products: bool
) -> None:
    monkeypatch.setattr("subquad.ops.pattern.strip_piece.unfused_pays", lambda rows, columns, like: by_products)
    q, k, v = heads(2200), heads(2200 + query_offset), heads(2200 + query_offset)
    assert_backends_agree(q, k, v, LONG["fixed"], query_offset=query_offset)


def test_wide_windows_in_float32_equal_the_definition() -> None:
    q, k, v = triple(2100, dtype=torch.float32, width=16)
    expected = pattern_attention(q.double(), k.double(), v.double(), Window(256, 256), backend="dense")
    found = pattern_attention(q, k, v, Window(256, 256), backend="blocked")
    weights = torch.randn_like(found)
    right = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for one, other in zip(torch.autograd.grad((found * weights).sum(), (q, k, v)), right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LONG)
def test_long_patterns_honour_padding_and_documents(name: str) -> None:
    valid = torch.arange(1100) < torch.tensor([[900], [1100]])
    documents = (torch.rand(2, 1100) < 0.005).long().cumsum(dim=1)
    assert_backends_agree(*triple(1100, batch=2), LONG[name], mask=Mask(valid, documents))


@pytest.mark.parametrize("name", LONG)
def test_a_row_receives_from_its_keys_and_from_no_other(name: str) -> None:
    length = 1100
    pattern = LONG[name]
    q, k, v = triple(length)
    out = pattern_attention(q, k, v, pattern)
    visible = pattern.dense(length)
    for row in (7, 65, 640, 1099):
        of_k, of_v = torch.autograd.grad(out[0, :, row].square().sum(), (k, v), retain_graph=True)
        assert torch.equal(of_v[0].abs().amax(dim=-1) > 0, visible[row].expand(2, -1))
        assert torch.equal(of_k[0].abs().amax(dim=-1) > 0, visible[row].expand(2, -1))


@pytest.mark.parametrize("name", [name for name, pattern in LONG.items() if pattern.causal])
def test_the_future_changes_nothing_of_a_causal_pattern(name: str) -> None:
    q, k, v = (tensor.detach() for tensor in triple(900))
    before = pattern_attention(q, k, v, LONG[name])
    for tensor in (q, k, v):
        tensor[:, :, 517:] = 100.0
    assert torch.equal(pattern_attention(q, k, v, LONG[name])[:, :, :517], before[:, :, :517])


def test_packed_documents_never_mix() -> None:
    documents = torch.tensor([[0] * 300 + [1] * 500])
    q, k, v = (tensor.detach() for tensor in triple(800))
    packed = pattern_attention(q, k, v, Window(40, 40), mask=Mask(segments=documents))
    alone = pattern_attention(q[:, :, 300:], k[:, :, 300:], v[:, :, 300:], Window(40, 40))
    torch.testing.assert_close(packed[:, :, 300:], alone, rtol=1e-12, atol=1e-12)


def test_an_invalid_example_gives_zeros_and_finite_gradients() -> None:
    q, k, v = triple(200, batch=2)
    valid = torch.tensor([[True], [False]]).expand(2, 200)
    out, lse = pattern_attention_with_lse(q, k, v, Window(9, 9), mask=Mask(valid))
    assert not out[1].any()
    assert (lse[1] == -math.inf).all()
    for gradient in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert gradient.isfinite().all()
        assert not gradient[1].any()


def test_global_tokens_of_the_mask_are_columns_of_their_example() -> None:
    q, k, v = triple(300, batch=2)
    marked = torch.zeros(2, 300, dtype=torch.bool)
    marked[0, [3, 250]] = True
    out = pattern_attention(q, k, v, Window(5, 5), mask=Mask(global_tokens=marked))
    both = pattern_attention(q[:1], k[:1], v[:1], Window(5, 5) | Global([3, 250], rows=False))
    torch.testing.assert_close(out[:1], both, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out[1:], pattern_attention(q[1:], k[1:], v[1:], Window(5, 5)), rtol=1e-10, atol=1e-10)


def test_global_tokens_of_the_mask_stay_in_the_past_of_causal_heads_alone() -> None:
    q, k, v = triple(300)
    marked = torch.zeros(1, 300, dtype=torch.bool)
    marked[0, [3, 250]] = True
    chosen = Global([3, 250], rows=False)
    mixed = Causal().heads({1: Window(5, 5)})
    expected = pattern_attention(q, k, v, (mixed | (Causal() & chosen)).heads({1: Window(5, 5) | chosen}))
    for backend in ("blocked", "dense"):
        out = pattern_attention(q, k, v, mixed, mask=Mask(global_tokens=marked), backend=backend)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["window", "strided", "bigbird"])
def test_documents_may_begin_before_the_queries(name: str) -> None:
    q, k, v = heads(900, batch=2), heads(1100, batch=2), heads(1100, batch=2)
    documents = (torch.rand(2, 1100) < 0.005).long().cumsum(dim=1)
    facts = {"mask": Mask(segments=documents[:, 200:]), "key_segments": documents, "query_offset": 200}
    assert_backends_agree(q, k, v, LONG[name], **facts)


@pytest.mark.parametrize("backend", ["blocked", "dense"])
def test_autocast_narrows_nothing(backend: str) -> None:
    pattern = Causal() & Block(128)
    q, k, v = wide = triple(2048, dtype=torch.float32, width=16)
    plain = pattern_attention_with_lse(q, k, v, pattern, backend=backend)
    expected = torch.autograd.grad(plain[0].square().sum(), wide)
    with torch.autocast("cpu", torch.bfloat16):
        found = pattern_attention_with_lse(q, k, v, pattern, backend=backend)
        if backend == "blocked":  # torch's own nodes of the definition narrow what runs backward in here
            for one, other in zip(torch.autograd.grad(found[0].square().sum(), wide), expected, strict=True):
                assert torch.equal(one, other)
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LONG)
def test_narrow_dtypes_stay_close_to_float64(name: str, dtype: torch.dtype) -> None:
    q, k, v = wide = triple(1100, width=16)
    expected = pattern_attention(q, k, v, LONG[name])
    q, k, v = narrow = [tensor.detach().to(dtype).requires_grad_() for tensor in wide]
    found = pattern_attention(q, k, v, LONG[name])
    assert found.dtype == dtype
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for gradient, exact in zip(
        torch.autograd.grad(found.float().square().sum(), narrow),
        torch.autograd.grad(expected.square().sum(), wide),
        strict=True,
    ):
        assert (gradient.double() - exact).norm() / exact.norm() < tolerance


def test_strides_don_t_matter() -> None:
    stream = torch.randn(2, 300, 3, 2, 4, dtype=torch.float64)
    q, k, v = (stream[:, :, part].transpose(1, 2) for part in range(3))
    pattern = Window(20, 20) | Strided(16)
    expected = pattern_attention(q.contiguous(), k.contiguous(), v.contiguous(), pattern)
    torch.testing.assert_close(pattern_attention(q, k, v, pattern), expected)
    q, k, v = (tensor.mT.contiguous().mT for tensor in (q, k, v))
    torch.testing.assert_close(pattern_attention(q, k, v, pattern), expected)


def test_parts_of_a_softmax_merge_by_their_log_sum_exps() -> None:
    q, k, v = triple(300)
    near, far = Window(16, 16), ~Window(16, 16) & Strided(8)
    (one, one_lse), (other, other_lse) = (pattern_attention_with_lse(q, k, v, part) for part in (near, far))
    weight = torch.sigmoid(other_lse - one_lse)[..., None]
    torch.testing.assert_close(torch.lerp(one, other, weight), pattern_attention(q, k, v, near | far))


def test_nothing_to_attend_gives_nothing() -> None:
    for shape in ((0, 2, 5, 4), (1, 2, 0, 4)):
        q = torch.zeros(shape, requires_grad=True)
        out, lse = pattern_attention_with_lse(q, q, q, Causal())
        assert (out.shape, lse.shape) == (q.shape, q.shape[:3])


def test_torch_still_has_the_private_fused_operator() -> None:
    """`subquad.ops.fused` names it; when this fails, that module has to change and nothing else."""
    q, k, v = (torch.randn(2, 3, 8, 4) for _ in range(3))
    out, lse = fused_forward(q, k, v, 0.5, causal=True)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    gradients = fused_backward(torch.ones_like(out), q, k, v, out, lse, 0.5, causal=True)
    assert [gradient.shape for gradient in gradients] == [q.shape] * 3
