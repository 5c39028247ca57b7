"""Who is on whose list when tokens are sorted by bucket and cut into chunks: by pairs, for any rule.

    place_i = rank of i in the order of (bucket, position)        chunk_i = ⌊place_i / m⌋
    i's list in a round: the tokens of chunk_i and of the chunk before it

With `per_bucket` the rank is taken inside the own bucket, and the chunk before belongs to the same bucket.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ListRule(NamedTuple):
    """How the lists of a round are made.

    Attributes:
        chunk: m, tokens of a chunk.
        per_bucket: chunks are cut inside every bucket, and not from the whole order.
        causal: only earlier tokens are listed; for chunks inside buckets.
        same_bucket_only: only tokens of the own bucket are listed.
        dedup: a token that is listed in several rounds counts once, and not once a round.
        wrap: the first chunk of a round looks back at the last chunk of the round before; the first round at the last.
    """

    chunk: int
    per_bucket: bool = False
    causal: bool = False
    same_bucket_only: bool = False
    dedup: bool = False
    wrap: bool = False

    def different_rounds(self, rounds: int, length: int) -> int:
        """How many of the rounds have to be computed: one where a chunk holds everything, as all list the same."""
        return 1 if length <= self.chunk and not (self.per_bucket or self.same_bucket_only) else rounds


def listed_counts(buckets: Tensor, rule: ListRule, valid: Tensor | None = None) -> Tensor:
    """The definition: how often token j is on the lists of token i.

    Args:
        buckets: int64 (B, H, rounds, L).
        rule: how lists are made.
        valid: bool (B, L); an invalid token is on no list and takes no place in the order.

    Returns:
        int64 (B, H, L, L). A token is on its own list, once, if and only if nothing else is.
    """
    position = torch.arange(buckets.shape[-1], device=buckets.device)
    real = torch.ones_like(buckets[:, 0, 0], dtype=torch.bool) if valid is None else valid
    is_key, is_query = real[:, None, None, :], real[:, None, :, None]
    earlier, itself = position < position[:, None], position == position[:, None]
    counts, chunks = torch.zeros_like(buckets[:, :, 0])[..., None] * position, []
    for own in buckets.unbind(dim=2):
        same = own[..., :, None] == own[..., None, :]
        before = same & earlier if rule.per_bucket else (same & earlier) | (own[..., None, :] < own[..., :, None])
        chunk = (before & is_key).sum(dim=-1) // rule.chunk
        behind = chunk[..., :, None] - chunk[..., None, :]
        listed = (behind == 0) | (behind == 1)
        counts = counts + (listed & same if rule.per_bucket or rule.same_bucket_only else listed)
        chunks.append(chunk)
    if rule.wrap:
        for index, chunk in enumerate(chunks):
            before = chunks[index - 1].masked_fill(~real[:, None], -1)
            last = before == before.amax(dim=-1, keepdim=True)
            counts = counts + ((chunk == 0)[..., :, None] & last[..., None, :])
    counts = counts * (is_key & is_query & (earlier if rule.causal else ~itself))
    if rule.dedup:
        counts = counts.clamp_max(1)
    alone = (counts.sum(dim=-1, keepdim=True) == 0) & is_query
    return counts + (alone & itself)
