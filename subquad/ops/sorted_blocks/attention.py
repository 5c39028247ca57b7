"""Attention of each block to itself and to the block sorted to its place.

    K̃_u = Σ_v P_uv K_v,  Ṽ_u = Σ_v P_uv V_v        P from `sorting.py`, a matrix for each head

    joint:   one softmax over the keys [K_u; K̃_u]
    sum:     a softmax over K_u and one over K̃_u, added
    logits:  one softmax over the sums of scores, q · (K_u + K̃_u), with values V_u + Ṽ_u

Sorted keys keep their place inside the block. In causal form a query sees its own block up to itself and the sorted one
altogether, which is made of earlier blocks; before the first block stands a null key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.ops.packing import token_counts
from subquad.ops.softmax import softmax_attention
from subquad.ops.sorted_blocks.fused import Combine, FusedSortedBlocks, block_counts
from subquad.ops.sorted_blocks.fused import SortedBlocks as SortedBlocks
from subquad.ops.sorted_blocks.sorting import BlockScores, sorting_matrices


class NullKey(NamedTuple):
    """What causal queries of the first block see in place of a sorted block, at every place of it.

    Attributes:
        key: (H, E).
        value: (H, E).
    """

    key: Tensor
    value: Tensor


def sorted_block_attention_by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockScores,
    form: SortedBlocks,
    *,
    null: NullKey | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """The definition, one block after the other. Arguments and result as in `sorted_block_attention`."""
    lengths, causal = token_counts(q, valid), form.sorting.causal
    matrices = sorting_matrices(blocks, form.sorting, block_counts(lengths, form.block))
    examples = []
    for b, (length, matrix) in enumerate(zip(lengths, matrices, strict=True)):
        sorted_k, sorted_v = (_sort(tensor[b, :, :length], matrix, form.block) for tensor in (k, v))
        rows = []
        for block, start in enumerate(range(0, length, form.block)):
            own = slice(start, min(start + form.block, length))
            places = form.block if causal or length > form.block else length
            other_k, other_v = sorted_k[:, block, :places], sorted_v[:, block, :places]
            if causal and block == 0:
                assert null is not None
                other_k, other_v = (tensor[:, None].expand_as(other_k) for tensor in null)
            seen = torch.ones(q[b, :, own].shape[1], places, dtype=torch.bool, device=q.device)
            seen = seen.tril() if causal else seen
            tokens = (k[b, :, own], v[b, :, own]), (other_k, other_v)
            rows.append(attend_block(q[b, :, own], *tokens, seen, form.combine))
        examples.append(torch.cat([*rows, torch.zeros_like(q[b, :, length:])], dim=1))
    return torch.stack(examples) if examples else torch.zeros_like(q)


def _sort(x: Tensor, matrix: Tensor, block: int) -> Tensor:
    """X (H, L, E) in blocks, sorted: (H, N, block, E)."""
    in_blocks = F.pad(x, (0, 0, 0, -x.shape[1] % block)).unflatten(1, (-1, block))
    return (matrix.to(x.dtype) @ in_blocks.flatten(2)).unflatten(2, in_blocks.shape[2:])


def attend_block(
    q: Tensor, own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], seen: Tensor, combine: Combine
) -> Tensor:
    """Queries of a block to its keys and to those sorted to it.

    Args:
        q: (..., R, E).
        own: keys and values (..., S, E) of the block.
        other: keys and values (..., T, E) of the sorted block, T at least S.
        seen: bool, broadcastable to (..., R, T), the own places that each query may see.
        combine: how the two are put together.
    """
    count, missing = own[0].shape[-2], other[0].shape[-2] - own[0].shape[-2]
    own_seen, everything = seen[..., :count], torch.ones_like(seen)
    if combine == "joint":
        keys, values = (torch.cat(pair, dim=-2) for pair in zip(own, other, strict=True))
        return softmax_attention(q, keys, values, torch.cat((own_seen, everything), dim=-1))
    if combine == "sum":
        return softmax_attention(q, *own, own_seen) + softmax_attention(q, *other, everything)
    keys, values = (F.pad(x, (0, 0, 0, missing)) + y for x, y in zip(own, other, strict=True))
    return softmax_attention(q, keys, values, seen)


def sorted_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockScores,
    form: SortedBlocks,
    *,
    null: NullKey | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Attention to the own and the sorted block, in memory linear in the length.

    Autograd keeps the arguments, the result and, where there is one softmax, its log-sum-exp.

    Args:
        q: (B, H, L, E).
        k: (B, H, L, E).
        v: (B, H, L, E).
        blocks: what the scores of the blocks are made of, N = ⌈L / block⌉.
        form: sizes and kind.
        null: causal: what the first block sees in place of a sorted one.
        valid: bool (B, L), the valid tokens first; blocks without any take no part in sorting.

    Returns:
        (B, H, L, E), the dtype of q; 0 at invalid tokens.
    """
    nulls = (None, None) if null is None else null
    return FusedSortedBlocks.apply(q, k, v, *blocks, *nulls, form, token_counts(q, valid))  # pyright: ignore[reportReturnType] - apply has no types


def sorted_cut_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockScores,
    form: SortedBlocks,
    cut: int,
    *,
    valid: Tensor | None = None,
) -> Tensor:
    """Attention of all queries to the first `cut` sorted blocks; other arguments and result as above, not causal.

    Autograd keeps the sorted blocks too; the sorting matrix is computed again in the backward pass.
    """
    lengths = token_counts(q, valid)
    counts = block_counts(lengths, form.block)
    tokens = [
        length if count <= 1 else min(cut, count) * form.block for length, count in zip(lengths, counts, strict=True)
    ]

    def sort(k: Tensor, v: Tensor) -> list[Tensor]:
        matrices = [matrix[:, :cut] for matrix in sorting_matrices(blocks, form.sorting, counts)]
        return [_sort_examples(x, matrices, form.block, lengths, tokens) for x in (k, v)]

    found = checkpoint(sort, k, v, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(found, list)
    mask = None
    if len(set(tokens)) > 1:
        stand = torch.arange(max(tokens), device=q.device)
        mask = (stand < torch.tensor(tokens, device=q.device)[:, None])[:, None, None]
    out = F.scaled_dot_product_attention(q, found[0], found[1], attn_mask=mask)
    return out if valid is None else out.masked_fill(~valid[:, None, :, None], 0.0)


def _sort_examples(x: Tensor, matrices: list[Tensor], block: int, lengths: list[int], tokens: list[int]) -> Tensor:
    """The first `tokens` of each example's sorted x (B, H, L, E), zeros behind them where others have more."""
    most, found = max(tokens, default=0), []
    for example, matrix, length, count in zip(x, matrices, lengths, tokens, strict=True):
        kept = _sort(example[:, :length], matrix, block).flatten(1, 2)[:, :count]
        found.append(F.pad(kept, (0, 0, 0, most - count)))
    return torch.stack(found) if found else x[:, :, :most]
