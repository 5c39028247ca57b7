"""The Sparse Transformer sees the paper's two sets, joined or apart, in valid tokens of the stream."""

from __future__ import annotations

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

from subquad import Mask
from subquad.build import build_mixer, make_dims
from subquad.interface import Dims
from subquad.layers.heads import projection_cost
from subquad.mechanisms.sparse_transformer import SparseTransformer, SparseTransformerConfig


@st.composite
def option_sets(draw: st.DrawFn) -> dict[str, Any]:
    stride = draw(st.integers(1, 9))
    summary = draw(st.integers(1, stride))
    return {
        "kind": draw(st.sampled_from(["strided", "fixed"])),
        "stride": stride,
        "summary": summary,
        "combine": draw(st.sampled_from(["merged", "local", "summary", "heads"])),
        "summary_sets": draw(st.integers(1, stride // summary)),
        "local_inclusive": draw(st.booleans()),
    }


def sparse(*, causal: bool, **options: Any) -> SparseTransformer:
    mixer = build_mixer("sparse_transformer", embed_dim=6, num_heads=3, causal=causal, **options)
    assert isinstance(mixer, SparseTransformer)
    disturbed(mixer)
    return mixer


def sees(config: SparseTransformerConfig, dims: Dims, head: int, i: int, j: int) -> bool:
    """Section 4 of the paper, pair by pair."""
    stride, summary = config.stride, config.summary
    if config.kind == "strided":
        near = abs(i - j) < stride or (abs(i - j) == stride and (config.local_inclusive or not dims.causal))
        far = (i - j) % stride == 0
    else:
        near = i // stride == j // stride
        from_the_end = stride - 1 - j % stride
        far = from_the_end // summary == head % config.summary_sets
    if config.combine == "heads":
        seen = near if head < dims.num_heads // 2 else far
    else:
        seen = {"merged": near or far, "local": near, "summary": far}[config.combine]
    return seen and (j <= i or not dims.causal)


def definition(mixer: SparseTransformer, x: Tensor, mask: Mask | None) -> Tensor:
    length, (q, k, v), out = x.shape[1], qkv(mixer, x), []
    ranks = [[sum(is_valid(mask, b, j) for j in range(i)) for i in range(length)] for b in range(x.shape[0])]
    for head in range(mixer.dims.num_heads):

        def visible(b: int, i: int, j: int, head: int = head) -> bool:
            facts = is_valid(mask, b, j) and same_document(mask, b, i, j)
            return facts and sees(mixer.config, mixer.dims, head, ranks[b][i], ranks[b][j])

        own = slice(head, head + 1)
        out.append(attend_by_loops(q[:, :, own], k[:, :, own], v[:, :, own], visible))
    return finish(mixer, torch.cat(out, dim=2), mask)


@pytest.mark.parametrize("causal", [False, True])
@given(length=st.integers(1, 30), options=option_sets(), data=st.data())
def test_it_equals_the_definition(causal: bool, length: int, options: dict[str, Any], data: st.DataObject) -> None:
    mixer = sparse(causal=causal, **options)
    mask = data.draw(masks(2, length, segments=mixer.config.traits.segments))
    x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@given(options=option_sets(), pieces=st.lists(st.integers(1, 9), min_size=1, max_size=4), data=st.data())
@example(options={"kind": "fixed", "stride": 4, "summary": 2, "combine": "summary"}, pieces=[1] * 9, data=None)
@example(options={"stride": 4, "combine": "heads"}, pieces=[3, 5, 8], data=None)
def test_a_stream_equals_the_definition_over_the_whole(
    options: dict[str, Any], pieces: list[int], data: st.DataObject | None
) -> None:
    length = sum(pieces)
    mixer = sparse(causal=True, **options)
    mask = None if data is None else data.draw(masks(2, length, segments=mixer.config.traits.segments))
    x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)

    assert_same_values_and_gradients(
        mixer, lambda: streamed(mixer, x, mask, pieces), lambda: definition(mixer, x, mask), [x]
    )


@pytest.mark.parametrize("causal", [False, True])
@given(length=st.integers(0, 70), options=option_sets())
def test_the_price_counts_the_visible_pairs(causal: bool, length: int, options: dict[str, Any]) -> None:
    config, dims = SparseTransformerConfig(**options), Dims(embed_dim=6, num_heads=3, head_dim=5, causal=causal)
    pairs = sum(sees(config, dims, head, i, j) for head in range(3) for i in range(length) for j in range(length))
    attention = config.cost(dims, length, 4).flops - projection_cost(dims, length, 4).flops
    assert attention == 2 * 2 * pairs * dims.head_dim


def pattern_of(length: int, *, causal: bool = True, num_heads: int = 1, **options: Any) -> Tensor:
    dims = make_dims(embed_dim=4 * num_heads, num_heads=num_heads, causal=causal)
    return SparseTransformerConfig(**options).pattern(dims).dense(length)


@given(length=st.integers(1, 70), stride=st.integers(1, 9), data=st.data())
def test_a_row_sees_as_many_keys_as_the_paper_counts(length: int, stride: int, data: st.DataObject) -> None:
    summary = data.draw(st.integers(1, stride))
    fixed: dict[str, Any] = {"kind": "fixed", "stride": stride, "summary": summary}
    counts = {
        "paper's window": pattern_of(length, stride=stride, combine="local", local_inclusive=True),
        "window": pattern_of(length, stride=stride, combine="local"),
        "strides": pattern_of(length, stride=stride, combine="summary"),
        "block": pattern_of(length, **fixed, combine="local"),
        "columns": pattern_of(length, **fixed, combine="summary"),
        "block and columns": pattern_of(length, **fixed),
    }
    for i in range(length):
        block, place = divmod(i, stride)
        assert {name: int(pattern[i].sum()) for name, pattern in counts.items()} == {
            "paper's window": min(i, stride) + 1,
            "window": min(i + 1, stride),
            "strides": block + 1,
            "block": place + 1,
            "columns": summary * block + max(0, place - (stride - summary) + 1),
            "block and columns": place + 1 + summary * block,
        }


@given(length=st.integers(1, 70), stride=st.integers(1, 9))
def test_two_steps_reach_every_earlier_token(length: int, stride: int) -> None:
    """The fixed form with the residual path counted, and the local step first: a summary has read its own block."""
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    local, summary = (pattern_of(length, stride=stride, combine=part).double() for part in ("local", "summary"))
    assert torch.equal(summary @ local > 0, earlier)
    assert torch.equal(local @ summary > 0, earlier)
    local, summary = (
        pattern_of(length, kind="fixed", stride=stride, summary=1, combine=part).double() + torch.eye(length)
        for part in ("local", "summary")
    )
    assert torch.equal(summary @ local > 0, earlier)


@given(options=option_sets(), length=st.integers(2, 20), data=st.data())
def test_a_later_token_changes_nothing_before_it(options: dict[str, Any], length: int, data: st.DataObject) -> None:
    mixer, changed = sparse(causal=True, **options), data.draw(st.integers(1, length - 1))
    x = torch.randn(1, length, 6, dtype=torch.float64)
    other = torch.cat((x[:, :changed], torch.randn_like(x[:, changed:])), dim=1)
    assert torch.equal(mixer(x).y[:, :changed], mixer(other).y[:, :changed])


def test_heads_take_the_columns_of_a_block_in_turn_from_its_end() -> None:
    options: dict[str, Any] = {"kind": "fixed", "stride": 6, "summary": 2, "combine": "summary"}
    three, two = (pattern_of(6, causal=False, num_heads=5, summary_sets=sets, **options) for sets in (3, 2))
    assert [row[0].nonzero()[:, 0].tolist() for row in three] == [[4, 5], [2, 3], [0, 1], [4, 5], [2, 3]]
    assert [row[0].nonzero()[:, 0].tolist() for row in two] == [[4, 5], [2, 3], [4, 5], [2, 3]]  # as the first


def test_the_middle_one_of_an_odd_number_of_heads_sees_the_summary() -> None:
    pattern = pattern_of(9, num_heads=3, stride=3, combine="heads")
    local, summary = (pattern_of(9, stride=3, combine=part) for part in ("local", "summary"))
    assert torch.equal(pattern, torch.stack((local, summary, summary)))


def test_tokens_without_a_summary_read_0_and_send_no_gradient() -> None:
    mixer = sparse(causal=True, kind="fixed", stride=5, summary=2, combine="summary")
    x = torch.randn(1, 8, 6, dtype=torch.float64, requires_grad=True)
    y = mixer(x).y
    torch.testing.assert_close(y[0, :3], mixer.project_out.bias.expand(3, -1), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(y[0, :3].sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options", [{"stride": 1, "combine": "summary"}, {"stride": 40}, {"kind": "fixed", "stride": 7, "summary": 7}]
)
def test_sets_that_hold_every_key_are_dense_attention(causal: bool, options: dict[str, Any]) -> None:
    mixer, x = sparse(causal=causal, **options), torch.randn(2, 30, 6, dtype=torch.float64)
    dense = build_mixer("full", embed_dim=6, num_heads=3, causal=causal).double()
    dense.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x).y, dense(x).y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "stride counts tokens and must be at least 1; got 0"),
        ({"summary": 0}, "must be at least 1, got 0; for none, take combine='local'"),
        (
            {"kind": "fixed", "stride": 4, "summary": 5},
            "5 summary columns don't fit into a block of 4 tokens; lower summary or raise stride",
        ),
        (
            {"kind": "fixed", "stride": 8, "summary": 2, "summary_sets": 5},
            r"summary_sets must lie in 1\.\.4, as many sets of 2 columns as fit into a block of 8 tokens; got 5",
        ),
        (
            {"combine": "heads"},
            "its own heads and needs at least 2, got num_heads=1; take more heads or combine='merged'",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="sparse_transformer: .*" + message):
        build_mixer("sparse_transformer", embed_dim=4, num_heads=1, **options)


def test_a_stride_may_be_shorter_than_a_summary_that_it_does_not_use() -> None:
    mixer, other = (sparse(causal=True, stride=4, summary=summary) for summary in (4, 8))
    other.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    assert torch.equal(other(x).y, mixer(x).y)


def test_the_fixed_form_refuses_packed_documents() -> None:
    mixer, x = sparse(causal=True, kind="fixed", stride=4, summary=2), torch.randn(1, 9, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"sparse_transformer: mask.segments is not supported"):
        mixer(x, mask=Mask(segments=torch.zeros(1, 9, dtype=torch.int64)))
