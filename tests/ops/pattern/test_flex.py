"""FlexAttention as a backend: block masks hold every visible pair and no other, results are the definition's."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, flex_attention

from subquad.mask import Mask
from subquad.ops.pattern import flex
from subquad.ops.pattern.attention import attend_dense
from subquad.ops.pattern.flex import attend_flex, block_classes, make_block_mask
from subquad.ops.pattern.request import Request, check_request, visible_mask
from subquad.patterns import (
    Block,
    BlockWindow,
    Causal,
    Columns,
    Dilated,
    Documents,
    Global,
    Log,
    Pattern,
    Random,
    Sink,
    Strided,
    Tile,
    Window,
)


def compiled(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that compiles; torch's compiler warns of its own deprecations."""
    return pytest.mark.compiler(pytest.mark.filterwarnings("ignore")(test))


def bigbird_by_heads() -> Pattern:
    """Random blocks of their own for heads 1 and 2."""
    fixed = BlockWindow(16, 1, 1) | Global(range(16))
    heads = [fixed | Random(16, 2, seed, exclude=fixed) for seed in range(3)]
    return heads[0].heads({1: heads[1], 2: heads[2]})


PATTERNS: dict[str, Pattern] = {
    "causal window and globals": Causal() & (Window(20, 0) | Global((0, 150))),
    "sparse transformer, strided": Causal() & (Window(15, 0) | Strided(16)),
    "sparse transformer, fixed": Causal() & (Block(32) | Columns(32, 4, 8)),
    "strided in both directions": Strided(7),
    "bigbird, random by heads": bigbird_by_heads(),
    "log-sparse": Log(),
    "dilated by head": Window(9, 9).heads({2: Dilated(9, 9, 4)}),
    "all but a window": ~Window(140, 3),
    "sinks": Causal() & (Window(130, 0) | Sink(4)),
}


def tensors(queries: int, keys: int, *, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    sizes = ((batch, 4, length, 16) for length in (queries, keys, keys))
    return tuple(torch.randn(size, dtype=dtype) for size in sizes)


def request(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **changes: Any) -> Request:
    arguments: dict[str, Any] = {"mask": None, "key_valid": None, "key_segments": None, "scale": None}
    return check_request(q, k, v, pattern, **{**arguments, "query_offset": 0, **changes})


def written_out(mask: BlockMask, shape: tuple[int, int, int, int]) -> Tensor:
    """What a kernel makes of a block mask: full blocks as a whole, partial ones by `mask_mod`; bool (B, H, L, S)."""
    batch, heads = shape[:2]
    positions = [
        torch.arange(size).view([-1 if axis == at else 1 for axis in range(4)]) for at, size in enumerate(shape)
    ]
    pairs = mask.mask_mod(*positions).expand(shape)
    seen = torch.zeros(shape, dtype=torch.bool)
    for counts, indices, whole in (
        (mask.kv_num_blocks, mask.kv_indices, False),
        (mask.full_kv_num_blocks, mask.full_kv_indices, True),
    ):
        assert counts is not None
        assert indices is not None
        blocks = indices.expand(batch, heads, -1, -1)
        for b, h, row in torch.cartesian_prod(*(torch.arange(size) for size in blocks.shape[:3])).tolist():
            own = slice(row * flex.BLOCK, (row + 1) * flex.BLOCK)
            for column in blocks[b, h, row, : counts.expand(batch, heads, -1)[b, h, row]].tolist():
                other = slice(column * flex.BLOCK, (column + 1) * flex.BLOCK)
                assert not seen[b, h, own, other].any(), "a block must be listed once"
                seen[b, h, own, other] = True if whole else pairs[b, h, own, other]
    return seen


def assert_same_pairs(q: Tensor, k: Tensor, asked: Request) -> None:
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    expected = visible_mask(asked, asked.pattern.resolve(k.shape[2]), q.shape[1], range(q.shape[2]), range(k.shape[2]))
    assert torch.equal(written_out(make_block_mask(q, k, asked), shape), expected.expand(shape))


@pytest.mark.parametrize("length", [200, 256, 300])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_block_mask_holds_every_visible_pair_and_no_other(pattern: Pattern, length: int) -> None:
    q, k, v = tensors(length, length)
    assert_same_pairs(q, k, request(q, k, v, pattern))


@settings(max_examples=60)
@given(data=st.data())
def test_facts_of_every_example_are_in_its_block_mask(data: st.DataObject) -> None:
    draw, generator = data.draw, torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    queries, keys = draw(st.integers(1, 40)), draw(st.integers(20, 40))
    if draw(st.booleans()):
        keys = queries
    pattern = draw(
        st.sampled_from([Causal() & Window(9, 0), Block(8) | Sink(2), BlockWindow(4, 1, 0).heads({1: Causal()}), Log()])
    )
    changes: dict[str, Any] = {}

    def chosen(length: int) -> Tensor | None:
        share = draw(st.sampled_from([None, 0.1, 0.6, 0.95]))
        return None if share is None else torch.rand(2, length, generator=generator) < share

    def numbered(length: int) -> Tensor:
        return (torch.rand(2, length, generator=generator) < 0.15).cumsum(dim=1)

    segments = numbered(queries) if draw(st.booleans()) else None
    changes["mask"] = Mask(chosen(queries), segments, chosen(queries) if queries == keys else None)
    changes["key_valid"] = chosen(keys)
    if segments is not None and queries != keys:
        changes["key_segments"] = numbered(keys)
    changes["query_offset"] = draw(st.sampled_from([0, 5, torch.tensor([0, 17])]))
    q, k, v = tensors(queries, keys)
    original, flex.BLOCK = flex.BLOCK, 8
    flex._of_pattern.cache_clear()
    try:
        assert_same_pairs(q, k, request(q, k, v, pattern, **changes))
    finally:
        flex.BLOCK = original
        flex._of_pattern.cache_clear()


def test_dimensions_of_examples_and_heads_are_one_where_nothing_differs() -> None:
    q, k, v = tensors(300, 300)
    shape = (3, 3)
    assert block_classes(q, k, request(q, k, v, Causal())).shape == (1, 1, *shape)
    assert block_classes(q, k, request(q, k, v, Causal().heads({1: Log()}))).shape == (1, 4, *shape)
    offsets = request(q[:, :, :5], k, v, Causal(), query_offset=torch.tensor([3, 9]))
    assert block_classes(q[:, :, :5], k, offsets).shape == (2, 1, 1, 3)
    padded = request(q, k, v, Causal(), mask=Mask.from_lengths([300, 20], 300))
    classes = block_classes(q, k, padded)
    assert classes.shape == (2, 1, *shape)
    assert classes[0, 0].tolist() == [[Tile.PARTIAL, 0, 0], [Tile.FULL, Tile.PARTIAL, 0], [2, 2, Tile.PARTIAL]]
    assert classes[1, 0].tolist() == [[Tile.PARTIAL, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_a_block_mask_of_a_long_sequence_has_one_entry_for_each_block() -> None:
    q, k, v = (torch.zeros(1, 1, 2**15, 1) for _ in range(3))
    mask = make_block_mask(q, k, request(q, k, v, Causal() & Window(511, 0)))
    blocks = 2**15 // flex.BLOCK
    assert mask.kv_indices.shape == (1, 1, blocks, blocks)
    listed = [
        None if counts is None else counts.max().item() for counts in (mask.kv_num_blocks, mask.full_kv_num_blocks)
    ]
    assert listed == [2, 3]


def test_the_names_that_this_backend_takes_from_torch_are_there() -> None:
    def takes(function: Any, *names: str) -> bool:
        return set(names) <= set(inspect.signature(function).parameters)

    assert takes(flex_attention, "query", "key", "value", "block_mask", "scale", "return_aux")
    assert takes(
        BlockMask.from_kv_blocks,
        *("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
        *("BLOCK_SIZE", "mask_mod", "seq_lengths"),
    )
    assert takes(torch.compile, "fullgraph", "dynamic", "recompile_limit", "isolate_recompiles")
    assert AuxRequest(lse=True).lse
    assert "lse" in AuxOutput._fields


def test_gradients_on_the_cpu_are_refused_with_what_to_do() -> None:
    q, k, v = tensors(8, 8)
    q.requires_grad_()
    with pytest.raises(ValueError, match=r'backend="flex" has no backward .* use backend="blocked", or .*no_grad'):
        attend_flex(q, k, v, request(q, k, v, Causal()), with_lse=False)


def test_the_log_sum_exp_on_the_cpu_is_refused_with_what_to_do() -> None:
    q, k, v = tensors(8, 8)
    with pytest.raises(ValueError, match='gives no log-sum-exp on the CPU; use backend="blocked", or leave it out'):
        attend_flex(q, k, v, request(q, k, v, Causal()), with_lse=True)


def test_a_dtype_that_it_does_not_compute_in_is_refused_with_what_to_do() -> None:
    q, k, v = tensors(8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r'computes in .*float32, .*, got torch.float64; use backend="blocked"'):
        attend_flex(q, k, v, request(q, k, v, Causal()), with_lse=False)


def test_heads_too_narrow_for_a_gpu_are_refused_with_what_to_do() -> None:
    q = torch.zeros(1, 2, 8, 8, device="meta")
    with pytest.raises(ValueError, match='at least 16 wide on meta, got 8; take fewer heads, or use backend="blocked"'):
        attend_flex(q, q, q, request(q, q, q, Causal()), with_lse=True)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_no_tokens_give_nothing(batch: int, queries: int, keys: int) -> None:
    q, k, v = tensors(queries, keys, batch=batch)
    out, lse = attend_flex(q, k, v, request(q, k, v, Causal()), with_lse=False)
    assert torch.equal(out, torch.zeros_like(q))
    assert lse is None


def assert_equals_the_definition(pattern: Pattern, queries: int, keys: int, **changes: Any) -> None:
    q, k, v = tensors(queries, keys)
    asked = request(q, k, v, pattern, **changes)
    out, lse = attend_flex(q, k, v, asked, with_lse=False)
    assert lse is None
    # The definition in float64: what is left is the rounding of float32 alone.
    expected = attend_dense(q.double(), k.double(), v.double(), asked)[0]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)


@compiled
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_compiled_flex_attention_equals_the_definition(pattern: Pattern) -> None:
    assert_equals_the_definition(pattern, 300, 300)


@compiled
@pytest.mark.parametrize("length", [1, 100, 128, 129, 257])
def test_lengths_need_not_fill_their_blocks(length: int) -> None:
    assert_equals_the_definition(Causal() & (Window(40, 0) | Global(0)), length, length)


@compiled
def test_padding_documents_and_global_columns_are_honoured() -> None:
    generator = torch.Generator().manual_seed(3)
    valid = torch.rand(2, 300, generator=generator) < 0.8
    segments = (torch.rand(2, 300, generator=generator) < 0.02).cumsum(dim=1)
    columns = torch.rand(2, 300, generator=generator) < 0.05
    window = Causal() & Window(30, 0)
    for mask in (
        Mask(valid=valid),
        Mask.from_lengths([300, 0], 300),
        Mask(segments=segments),
        Mask(global_tokens=columns),
        Mask(valid, segments, columns),
    ):
        assert_equals_the_definition(window, 300, 300, mask=mask)
    assert_equals_the_definition(Window(30, 30) | Documents(segments[0]), 300, 300, mask=Mask(valid))


@compiled
def test_cached_decoding_by_offsets_equals_the_definition() -> None:
    valid = torch.arange(300) < torch.tensor([[105], [300]])
    pattern = Causal() & (Window(30, 0) | Strided(16))
    assert_equals_the_definition(pattern, 5, 300, query_offset=200)
    assert_equals_the_definition(pattern, 5, 300, query_offset=torch.tensor([100, 295]), key_valid=valid)
    assert_equals_the_definition(Causal(), 140, 300, query_offset=160)


@compiled
def test_queries_that_see_nothing_give_zero() -> None:
    q, k, v = tensors(150, 150)
    nothing_first = Causal() & Columns(140, 1)
    out, _ = attend_flex(q, k, v, request(q, k, v, nothing_first), with_lse=False)
    assert torch.equal(out[:, :, :139], torch.zeros(2, 4, 139, 16))
    torch.testing.assert_close(out[:, :, 139:], v[:, :, 139:140].expand(-1, -1, 11, -1))


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_stays_near_the_definition(dtype: torch.dtype) -> None:
    q, k, v = tensors(150, 150, dtype=dtype)
    asked = request(q, k, v, Causal() & Window(20, 0))
    out, _ = attend_flex(q, k, v, asked, with_lse=False)
    assert out.dtype == dtype
    expected = attend_dense(q.float(), k.float(), v.float(), asked)[0]
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


@compiled
def test_leaves_that_require_gradients_are_served_where_none_are_taken() -> None:
    q, k, v = tensors(150, 150)
    q.requires_grad_()
    with torch.no_grad():
        asked = request(q, k, v, Causal())
        out, _ = attend_flex(q, k, v, asked, with_lse=False)
        torch.testing.assert_close(out, attend_dense(q, k, v, asked)[0], rtol=1e-5, atol=2e-6)
    assert not out.requires_grad


@compiled
def test_strides_and_scale_are_free() -> None:
    q, k, v = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors(150, 150))
    asked = request(q, k, v, Causal(), scale=math.sqrt(0.3))
    out, _ = attend_flex(q, k, v, asked, with_lse=False)
    torch.testing.assert_close(out, attend_dense(q, k, v, asked)[0], rtol=1e-5, atol=2e-6)


@compiled
def test_a_pattern_is_compiled_once_for_one_shape() -> None:
    q, k, v = tensors(150, 150)

    def attend() -> int:
        mask = Mask(valid=torch.rand(2, 150) < 0.5)
        attend_flex(q, k, v, request(q, k, v, Causal() & Window(21, 0), mask=mask), with_lse=False)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    first = attend()
    assert attend() == first
    assert attend() == first
