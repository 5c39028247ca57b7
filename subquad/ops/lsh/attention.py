"""Attention among vectors that hash into the same buckets, with queries and keys in one.

    k_j = q_j / |q_j|       o_i = Σ_j c_ij exp(q_i · k_j) v_j / Σ_j c_ij exp(q_i · k_j)

c_ij says how often j is on the lists of i: `lists` defines them, `hash` the buckets. No token attends to itself
unless nothing else is on its lists. No gradient flows through buckets and lists.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.ops.lsh.hash import check_buckets, hash_into_buckets, random_rotations, rotation_columns
from subquad.ops.lsh.lists import ListRule
from subquad.ops.lsh.tiles import attend_in_buckets, attend_in_buckets_by_pairs, unit_keys
from subquad.ops.precision import full_precision, wide_dtype

Chunks = Literal["global", "bucket"]

LARGEST_SLICE = 2**21
"""Pairs of queries and stored keys, over all examples and heads, that are looked at together."""


def lsh_attention_by_pairs(
    qk: Tensor,
    v: Tensor,
    *,
    rounds: int,
    chunk: int,
    buckets: int | tuple[int, ...],
    seed: int,
    chunks: Chunks = "global",
    causal: bool = False,
    valid: Tensor | None = None,
    same_bucket_only: bool = False,
    dedup: bool = False,
    wrap: bool = False,
    chunks_before: int = 1,
    chunks_after: int = 0,
) -> Tensor:
    """The definition. Arguments and result as in `lsh_attention`."""
    options = (same_bucket_only, dedup, wrap, chunks_before, chunks_after)
    rule = list_rule("lsh_attention", chunk, chunks, causal, *options)
    hashed = _hash(qk, rounds, buckets, seed)
    return attend_in_buckets_by_pairs(qk, v, hashed, rule, valid)


def lsh_attention(
    qk: Tensor,
    v: Tensor,
    *,
    rounds: int,
    chunk: int,
    buckets: int | tuple[int, ...],
    seed: int,
    chunks: Chunks = "global",
    causal: bool = False,
    valid: Tensor | None = None,
    same_bucket_only: bool = False,
    dedup: bool = False,
    wrap: bool = False,
    chunks_before: int = 1,
    chunks_after: int = 0,
) -> Tensor:
    """Attention in buckets, in time O(L (rounds chunk E + log L)) and memory linear in L.

    Args:
        qk: (B, H, L, E), queries, and keys before they are made of unit length.
        v: (B, H, L, E).
        rounds: number of hashes.
        chunk: tokens of a chunk.
        buckets: their count, 1 or even, or a list of factors of it, each hashed by itself.
        seed: of the rotations.
        chunks: "global" cuts the order of all tokens, "bucket" every bucket by itself.
        causal: only earlier tokens are seen; needs chunks="bucket".
        valid: bool (B, L), True for real tokens.
        same_bucket_only: a chunk's tokens of other buckets are not seen.
        dedup: a token that is found in several rounds counts once.
        wrap: the chunks of all rounds are a ring: a round's first chunk looks back at the last one of the round before,
            its last one ahead at the first of the next.
        chunks_before: how many chunks before its own a token sees.
        chunks_after: how many behind it, none in the causal form; on a ring no chunk is seen twice in a round.

    Returns:
        (B, H, L, E), the dtype of v; 0 at invalid tokens.

    Raises:
        ValueError: shapes that don't fit together, sizes out of range, or options that don't.
    """
    options = (same_bucket_only, dedup, wrap, chunks_before, chunks_after)
    rule = list_rule("lsh_attention", chunk, chunks, causal, *options)
    _check_shapes(qk, v, valid)
    if valid is not None:
        qk, v = (x.masked_fill(~valid[:, None, :, None], 0.0) for x in (qk, v))
    return attend_in_buckets(qk, v, _hash(qk, rounds, buckets, seed), rule, valid)


def continue_in_buckets(
    qk: Tensor, keys: Tensor, v: Tensor, buckets: Tensor, key_buckets: Tensor, columns: Tensor, rule: ListRule
) -> Tensor:
    """Attention of a stream's next tokens to everything stored, by causal lists inside buckets; O(T) a query.

    Args:
        qk: (B, H, L, E), the queries.
        keys: (B, H, T, E), shared vectors of the stored tokens, those of the queries included.
        v: (B, H, T, E).
        buckets: int64 (B, H, rounds, L).
        key_buckets: int64 (B, H, rounds, T).
        columns: int64 (B, L), where each query is stored; all columns before it hold tokens.
        rule: how lists are made.

    Returns:
        (B, H, L, E), the dtype of v.
    """
    height = max(1, LARGEST_SLICE // max(1, keys.shape[0] * keys.shape[1] * keys.shape[2]))
    pieces = zip(qk.split(height, dim=2), buckets.split(height, dim=3), columns.split(height, dim=1), strict=True)
    attend = partial(checkpoint, _attend_slice, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([attend(*piece, keys, v, key_buckets, rule) for piece in pieces], dim=2)


def _attend_slice(
    qk: Tensor, buckets: Tensor, columns: Tensor, keys: Tensor, v: Tensor, key_buckets: Tensor, rule: ListRule
) -> Tensor:
    wide, position = wide_dtype(qk), torch.arange(keys.shape[2], device=keys.device)
    column = columns[:, None, :, None]
    counts = torch.zeros_like(buckets[:, :, 0])[..., None] * position
    for own, stored in zip(buckets.unbind(dim=2), key_buckets.unbind(dim=2), strict=True):
        same = (own[..., :, None] == stored[..., None, :]) & (position < column)
        rank, own_rank = same.cumsum(dim=-1) - 1, same.sum(dim=-1, keepdim=True)
        counts = counts + (same & (rank >= (own_rank // rule.chunk - rule.chunks_before) * rule.chunk))
    if rule.dedup:
        counts = counts.clamp_max(1)
    counts = counts + ((counts.sum(dim=-1, keepdim=True) == 0) & (position == column))
    with full_precision(qk.device):
        scores = qk.to(wide) @ unit_keys(keys.to(wide)).mT + counts.to(wide).log()
        return (scores.softmax(dim=-1) @ v.to(wide)).to(v.dtype)


def list_rule(
    owner: str,
    chunk: int,
    chunks: Chunks,
    causal: bool,
    same_bucket_only: bool,
    dedup: bool,
    wrap: bool,
    chunks_before: int,
    chunks_after: int,
) -> ListRule:
    """The rule of some options.

    Raises:
        ValueError: a chunk of no tokens, less than no chunks, or options that exclude each other.
    """
    if chunk < 1:
        raise ValueError(f"{owner}: chunk counts the tokens of a chunk and must be at least 1, got {chunk}")
    for name, count in (("chunks_before", chunks_before), ("chunks_after", chunks_after)):
        if count < 0:
            raise ValueError(f"{owner}: {name} counts chunks beside the own one and must not be negative, got {count}")
    if chunks not in ("global", "bucket"):
        raise ValueError(f"{owner}: chunks must be 'global' or 'bucket', got {chunks!r}")
    if causal and chunks == "global":
        raise ValueError(
            f"{owner}: causal=True is not possible with chunks='global': a later token moves the borders of all chunks "
            "behind it in the sorted order, and so changes what earlier tokens see; use chunks='bucket'"
        )
    if causal and chunks_after:
        raise ValueError(
            f"{owner}: causal=True is not possible with chunks_after={chunks_after}: the chunks behind a token's own "
            "hold later tokens alone; use chunks_after=0, and chunks_before to see more"
        )
    if wrap and (same_bucket_only or chunks == "bucket"):
        other = "chunks='bucket'" if chunks == "bucket" else "same_bucket_only=True"
        raise ValueError(
            f"{owner}: wrap=True shows the first chunk of a round tokens of another round, whose buckets have nothing "
            f"in common with its own; it excludes {other}"
        )
    return ListRule(chunk, chunks == "bucket", causal, same_bucket_only, dedup, wrap, chunks_before, chunks_after)


def _hash(qk: Tensor, rounds: int, buckets: int | tuple[int, ...], seed: int) -> Tensor:
    if rounds < 1:
        raise ValueError(f"lsh_attention: rounds counts the hashes and must be at least 1, got {rounds}")
    factors = (buckets,) if isinstance(buckets, int) else buckets
    check_buckets("lsh_attention", factors)
    generator = torch.Generator().manual_seed(seed)
    columns = rotation_columns(factors)
    rotations = random_rotations(rounds, qk.shape[1], qk.shape[3], columns, generator=generator)
    return hash_into_buckets(qk, rotations.to(qk.device), factors)


def _check_shapes(qk: Tensor, v: Tensor, valid: Tensor | None) -> None:
    if qk.ndim != 4 or v.shape != qk.shape:
        shapes = f"{tuple(qk.shape)}, {tuple(v.shape)}"
        raise ValueError(f"lsh_attention: qk and v must both be (B, H, L, E), got {shapes}")
    expected = (qk.shape[0], qk.shape[2])
    if valid is not None and (valid.dtype != torch.bool or valid.shape != expected):
        raise ValueError(f"lsh_attention: valid must be bool {expected}, got {valid.dtype} {tuple(valid.shape)}")
