"""Attention to own and sorted blocks: the fast form against the definition, and the permutations known exactly."""

from __future__ import annotations

from typing import Literal, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad.ops.softmax import softmax_attention
from subquad.ops.sorted_blocks import fused as sorted_blocks_fused
from subquad.ops.sorted_blocks.attention import (
    NullKey,
    SortedBlocks,
    sorted_block_attention,
    sorted_block_attention_by_blocks,
    sorted_cut_attention,
)
from subquad.ops.sorted_blocks.sorting import BlockScores, Sorting, sorting_matrices

COMBINE: tuple[Literal["joint", "sum", "logits"], ...] = ("joint", "sum", "logits")


class Inputs(NamedTuple):
    """Everything that gets a gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: BlockScores
    null: NullKey

    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *self.blocks, *self.null]


def inputs(length: int, block: int, *, dtype: torch.dtype = torch.float64) -> Inputs:
    count = -(-length // block)
    shapes = ((2, 3, length, 4),) * 3 + ((2, count, 5), (3, count + 1, 5), (3, count + 1), (3, 4), (3, 4))
    q, k, v, *others = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    return Inputs(q, k, v, BlockScores(*others[:3]), NullKey(*others[3:]))


def assert_same(one: Tensor, other: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(one)
    both = [
        torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
        for out in (one, other)
    ]
    for gradient, expected in zip(*both, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("call_bytes", [4 * 2**20, 1])
@given(
    length=st.sampled_from([1, 2, 3, 4, 5, 8, 9, 15]),
    block=st.sampled_from([1, 4]),
    causal=st.booleans(),
    combine=st.sampled_from(COMBINE),
    padded=st.booleans(),
    seed=st.sampled_from([None, 7]),
)
def test_the_fast_form_equals_the_definition(
    call_bytes: int,
    length: int,
    block: int,
    causal: bool,
    combine: Literal["joint", "sum", "logits"],
    padded: bool,
    seed: int | None,
) -> None:
    given_inputs = inputs(length, block)
    form = SortedBlocks(block, Sorting(3, 0.7, causal, seed), combine)
    valid = torch.arange(length) < torch.tensor([[max(0, length - 3)], [length]]) if padded else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorted_blocks_fused, "CALL_BYTES", call_bytes)
        q, k, v, blocks, null = given_inputs
        known = null if causal else None
        expected = sorted_block_attention_by_blocks(q, k, v, blocks, form, null=known, valid=valid)
        found = sorted_block_attention(q, k, v, blocks, form, null=known, valid=valid)
        assert_same(found, expected, given_inputs.leaves())


@given(length=st.sampled_from([1, 3, 4, 9, 16]), cut=st.integers(1, 5), padded=st.booleans())
def test_a_cut_equals_attention_to_the_first_sorted_blocks(length: int, cut: int, padded: bool) -> None:
    q, k, v, blocks, _ = inputs(length, 4)
    form = SortedBlocks(4, Sorting(3, 0.7, causal=False, noise_seed=3))
    lengths = [max(0, length - 3), length] if padded else [length, length]
    valid = torch.arange(length) < torch.tensor(lengths)[:, None] if padded else None
    outs = []
    for b, matrix in enumerate(sorting_matrices(blocks, form.sorting, [-(-count // 4) for count in lengths])):
        outs.append(_first_blocks(q[b], k[b], v[b], matrix, cut, lengths[b]))
    found = sorted_cut_attention(q, k, v, blocks, form, cut, valid=valid)
    assert_same(found, torch.stack(outs), [q, k, v, *blocks])


def _first_blocks(q: Tensor, k: Tensor, v: Tensor, matrix: Tensor, cut: int, count: int) -> Tensor:
    """Token t of sorted block u is the mixture of the tokens t of all blocks; behind the end there is nothing."""
    blocks = range(-(-count // 4))
    zero = torch.zeros_like(k[:, 0])
    places = [(u, t) for u in list(blocks)[:cut] for t in range(4 if count > 4 else count)]
    mixed = []
    for tokens in (k, v):
        mixture = [
            sum((matrix[:, u, w, None] * tokens[:, 4 * w + t] for w in blocks if 4 * w + t < count), zero)
            for u, t in places
        ]
        mixed.append(torch.stack(mixture, dim=1) if mixture else tokens[:, :0])
    visible = (torch.arange(q.shape[1]) < count)[:, None].expand(-1, len(places))
    return softmax_attention(q, mixed[0], mixed[1], visible)


@pytest.mark.parametrize("combine", COMBINE)
def test_a_given_permutation_is_attention_to_the_own_and_the_permuted_block(
    combine: Literal["joint", "sum", "logits"],
) -> None:
    q, k, v, _, _ = inputs(20, 4)
    order = torch.tensor([3, 0, 4, 2, 1])
    permutation = torch.eye(5, dtype=torch.float64)[order]
    hidden = torch.eye(5, dtype=torch.float64).expand(2, -1, -1)
    blocks = BlockScores(hidden, permutation.T.expand(3, -1, -1), torch.zeros(3, 5, dtype=torch.float64))
    found = sorted_block_attention(q, k, v, blocks, SortedBlocks(4, Sorting(9, 1e-3, causal=False), combine))
    place = torch.arange(20)
    partner = (order[:, None] * 4 + torch.arange(4)).flatten()
    own = place[:, None] // 4 == place // 4
    other_k, other_v = k[:, :, partner], v[:, :, partner]
    if combine == "joint":
        keys, values = torch.cat((k, other_k), dim=2), torch.cat((v, other_v), dim=2)
        expected = softmax_attention(q, keys, values, own.repeat(1, 2))
    elif combine == "sum":
        expected = softmax_attention(q, k, v, own) + softmax_attention(q, other_k, other_v, own)
    else:
        expected = softmax_attention(q, k + other_k, v + other_v, own)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_causal_permutation_sees_an_earlier_block_altogether_and_the_null_key_first() -> None:
    q, k, v, _, null = inputs(12, 4)
    chosen = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    hidden = torch.eye(3, dtype=torch.float64).expand(2, -1, -1)
    blocks = BlockScores(hidden, chosen.T.expand(3, -1, -1), torch.zeros(3, 3, dtype=torch.float64))
    form = SortedBlocks(4, Sorting(1, 1e-3, causal=True))
    found = sorted_block_attention(q, k, v, blocks, form, null=null)
    place, block = torch.arange(12), torch.arange(12) // 4
    visible = (block[:, None] - block == 1) | ((block[:, None] == block) & (place <= place[:, None]))
    first = softmax_attention(
        q[:, :, :4],
        torch.cat((k[:, :, :4], null.key[None, :, None].expand(2, -1, 4, -1)), dim=2),
        torch.cat((v[:, :, :4], null.value[None, :, None].expand(2, -1, 4, -1)), dim=2),
        torch.cat((visible[:4, :4], torch.ones(4, 4, dtype=torch.bool)), dim=1),
    )
    torch.testing.assert_close(found[:, :, :4], first, rtol=1e-10, atol=1e-10)
    rest = softmax_attention(q, k, v, visible)[:, :, 4:]
    torch.testing.assert_close(found[:, :, 4:], rest, rtol=1e-10, atol=1e-10)


def test_a_single_block_is_seen_twice_which_changes_no_mean() -> None:
    q, k, v, blocks, _ = inputs(3, 4)
    everything = torch.ones(3, 3, dtype=torch.bool)
    found = sorted_block_attention(q, k, v, blocks, SortedBlocks(4, Sorting(3, 0.7, causal=False)))
    torch.testing.assert_close(found, softmax_attention(q, k, v, everything), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_is_computed_in_float32(causal: bool) -> None:
    q, k, v, blocks, null = inputs(300, 64, dtype=torch.bfloat16)
    form, known = SortedBlocks(64, Sorting(4, 0.7, causal)), null if causal else None
    found = sorted_block_attention(q, k, v, blocks, form, null=known)
    wide = BlockScores(*(tensor.float() for tensor in blocks))
    wide_null = NullKey(*(tensor.float() for tensor in null)) if causal else None
    expected = sorted_block_attention(q.float(), k.float(), v.float(), wide, form, null=wide_null)
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)
