"""Pattern attention: the blocked backend equals the definition, keeps little, and says what it can't do."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_patterns import compositions
from torch import Tensor

from subquad import Mask, receipts
from subquad.ops import pattern_attention, pattern_attention_with_lse
from subquad.ops.fused import fused_backward, fused_forward
from subquad.ops.pattern import tile_piece
from subquad.ops.pattern.blocked import plan_pattern
from subquad.ops.pattern.strips import Shape
from subquad.patterns import (
    Block,
    BlockWindow,
    Causal,
    Columns,
    Dilated,
    Global,
    Ngram,
    Pattern,
    Random,
    Sink,
    Strided,
    Window,
    blocks,
)

BORDERS = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 400]
LONG = {
    "window": Window(128, 128),
    "causal window": Causal() & Window(127, 0),
    "dilated": Dilated(32, 32, 4),
    "strided": Causal() & (Window(127, 0) | Strided(128)),
    "fixed": Causal() & (Block(128) | Columns(128, 8)),
    "longformer": Window(64, 64) | Global([0, 700]),
    "bigbird": Global([*range(64)]) | BlockWindow(64, 1, 1) | Random(64, 3, seed=1),
    "sinks": Causal() & (Sink(4) | Window(127, 0)),
}


@pytest.fixture(autouse=True)
def cheap_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls priced as for wide heads, so that strips and tiles run at lengths that tests can afford."""
    monkeypatch.setattr("subquad.ops.pattern.blocked.CALL_FLOPS", 2**15)


def heads(length: int, *, batch: int = 1, dtype: torch.dtype = torch.float64, width: int = 4) -> Tensor:
    return torch.randn(batch, 2, length, width, dtype=dtype, requires_grad=True)


def triple(length: int, **shape: Any) -> tuple[Tensor, Tensor, Tensor]:
    return heads(length, **shape), heads(length, **shape), heads(length, **shape)


def assert_backends_agree(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **facts: Any) -> None:
    """Values, log-sum-exps, and the gradients of a random combination of both."""
    expected = pattern_attention_with_lse(q, k, v, pattern, backend="dense", **facts)
    found = pattern_attention_with_lse(q, k, v, pattern, backend="blocked", **facts)
    seen = expected[1].isfinite()
    weights, lse_weights = torch.randn_like(expected[0]), torch.randn_like(expected[1])

    def gradients(result: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        total = (result[0] * weights).sum() + (result[1].masked_fill(~seen, 0.0) * lse_weights).sum()
        return torch.autograd.grad(total, (q, k, v), materialize_grads=True, allow_unused=True)

    for one, other in zip((*found, *gradients(found)), (*expected, *gradients(expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


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
    for row in (0, 65, 640, 1099):
        (received,) = torch.autograd.grad(out[0, 0, row].sum(), v, retain_graph=True)
        assert torch.equal(received[0, 0].abs().amax(dim=-1) > 0, visible[row])


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


@pytest.mark.parametrize("name", LONG)
def test_only_q_k_v_the_result_and_its_log_sum_exp_are_kept(name: str) -> None:
    q, k, v = triple(1100, dtype=torch.float32, width=16)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pattern_attention(q, k, v, LONG[name])
    assert sum(kept.values()) == 4 * q.nbytes + q.nbytes // 16


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


def test_short_sequences_run_densely_and_say_so() -> None:
    q, k, v = triple(20)
    with receipts() as collected:
        pattern_attention(q, k, v, Window(9, 9) | Sink(2))
        pattern_attention(q, k, v, Window(9, 9) | Sink(2), backend="blocked")
    by_default, by_name = collected.entries
    assert (by_default.where, by_default.asked) == ("pattern_attention", "the default, blocked")
    assert by_name.asked == "blocked"
    assert "dense attention in slices" in by_name.ran
    assert "20 queries and 20 keys" in by_name.reason


def test_parts_of_a_softmax_merge_by_their_log_sum_exps() -> None:
    q, k, v = triple(300)
    near, far = Window(16, 16), ~Window(16, 16) & Strided(8)
    (one, one_lse), (other, other_lse) = (pattern_attention_with_lse(q, k, v, part) for part in (near, far))
    weight = torch.sigmoid(other_lse - one_lse)[..., None]
    torch.testing.assert_close(torch.lerp(one, other, weight), pattern_attention(q, k, v, near | far))


SORTED = Mask(segments=torch.arange(20, dtype=torch.uint8)[None] // 10)
UNSORTED = Mask(segments=SORTED.segments.flip(1))  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": Ngram(1)}, "no query sees any key"),
        ({"pattern": Causal() & ~Causal()}, "no query sees any key"),
        ({"pattern": Global(20)}, "index 20 lies past the end"),
        ({"pattern": Window(1, 1).heads({2: Causal()})}, r"speaks of head 2, q has 2 heads, counted from 0; give"),
        ({"pattern": "causal"}, "must come from subquad.patterns, got str"),
        ({"k": torch.zeros(1, 2, 20, 4)}, "one floating-point dtype"),
        ({"v": torch.zeros(1, 2, 19, 4, dtype=torch.float64)}, r"expected q \(B, H, L, E\)"),
        ({"q": torch.zeros(2, 20, 4, dtype=torch.float64)}, r"must be \(batch, heads, length, width\)"),
        ({"key_valid": torch.ones(1, 19, dtype=torch.bool)}, r"key_valid must have shape \(B, S\) = \(1, 20\)"),
        ({"key_valid": torch.ones(1, 20)}, "key_valid must be bool"),
        (
            {"query_offset": -1},
            "query_offset must be an integer of at least 0, got -1; it is the position of the first",
        ),
        ({"query_offset": 1.5}, "query_offset must be an integer of at least 0, got 1.5"),
        ({"query_offset": True}, "query_offset must be an integer of at least 0, got True"),
        ({"query_offset": torch.tensor([-3])}, "query_offset must be an integer of at least 0, got -3"),
        ({"query_offset": torch.ones(1, dtype=torch.bool)}, r"int64 \(B,\) = \(1,\), got torch.bool"),
        ({"mask": torch.ones(1, 20, dtype=torch.bool)}, r"must be a subquad.Mask, got Tensor; write Mask\(valid=...\)"),
        ({"key_valid": [True] * 20}, r"key_valid must be a tensor \(B, S\) = \(1, 20\), got list"),
        ({"scale": torch.ones(())}, "scale must be a number, got a tensor; multiply q by it"),
        ({"mask": UNSORTED}, "segments must not decrease along a sequence"),
        ({"query_offset": torch.zeros(2, dtype=torch.int64)}, r"int64 \(B,\) = \(1,\)"),
        ({"key_segments": torch.zeros(1, 20), "mask": SORTED}, "key_segments must hold integers, got torch.float32"),
        ({"key_segments": torch.zeros(1, 20, dtype=torch.int64)}, "compared with mask.segments, which are missing"),
        ({"backend": "fast"}, "unknown backend 'fast'; known: blocked, dense, flex"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {name: heads(20) for name in ("q", "k", "v")} | {"pattern": Causal()} | change
    with pytest.raises(ValueError, match=message):
        pattern_attention(**call)


def test_tensors_of_another_device_are_refused() -> None:
    q = heads(20)
    with pytest.raises(ValueError, match="q is on cpu but k is on meta; move it there"):
        pattern_attention(q, q.detach().to("meta"), q, Causal())


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


def kept_and_peak_bytes(pattern: Pattern, length: int) -> tuple[int, int]:
    """Of compiling a pattern for two heads."""
    plan_pattern.cache_clear()
    tracemalloc.start()
    plan = plan_pattern(pattern, Shape(2, length, length, 0, 8192), sliced=False)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.parts
    return kept, peak


@pytest.mark.parametrize("name", [*LONG, "random by head"])
def test_what_a_plan_takes_grows_as_the_length(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In chunks so small that their workspace, which has a bound, is lost beside it."""
    monkeypatch.setattr(tile_piece, "CLASSES", 2**12)
    monkeypatch.setattr(blocks, "CHUNK_PAIRS", 2**12)
    near = Window(64, 64) | Sink(128)
    by_head = (near | Random(64, 3, 0, near)).heads({1: near | Random(64, 3, 1, near)})
    pattern = by_head if name == "random by head" else LONG[name]
    (kept, peak), (twice_kept, twice_peak) = (kept_and_peak_bytes(pattern, length) for length in (8192, 16384))
    assert twice_kept < 2.5 * kept + 2**16
    assert twice_peak < 2.5 * peak + 2**16


def test_a_pattern_that_is_empty_at_this_length_says_so() -> None:
    q, k, v = triple(20)
    with receipts() as collected:
        out = pattern_attention(q, k, v, Columns(30, 1))
    assert not out.any()
    assert [(one.asked, one.ran) for one in collected.entries] == [("Columns(30, 1)", "no attention: the result is 0")]
