"""Who is on whose list when tokens are sorted by bucket and cut into chunks: by pairs, for any rule.

    place_i = rank of i in the order of (bucket, position)        chunk_i = ⌊place_i / m⌋
    i's list in a round: the tokens of chunk_i, of b chunks before it and of a chunks after it

With `per_bucket` the rank is taken inside the own bucket, and the other chunks belong to the same bucket. With `wrap`
the chunks of all rounds, one round behind the other, are a ring; where it has fewer than b + 1 + a, a list is the whole
ring, every chunk of it once.
"""

from __future__ import annotations

from itertools import product
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
        wrap: before a round's first chunk comes the last chunk of the round before, after its last one the first chunk
            of the next round; the first round follows the last.
        chunks_before: b, listed chunks before the own.
        chunks_after: a, listed chunks after the own.
    """

    chunk: int
    per_bucket: bool = False
    causal: bool = False
    same_bucket_only: bool = False
    dedup: bool = False
    wrap: bool = False
    chunks_before: int = 1
    chunks_after: int = 0

    @property
    def sides(self) -> tuple[int, int]:
        """Listed chunks before and after the own."""
        return self.chunks_before, self.chunks_after

    def within(self, rounds: int, length: int) -> ListRule:
        """A rule of the same lists for this length, which reaches no further than there are chunks."""
        most = -(-length // self.chunk) * (rounds if self.wrap else 1)
        return self._replace(chunks_before=min(self.chunks_before, most), chunks_after=min(self.chunks_after, most))

    def listed_pairs(self, rounds: int, length: int) -> int:
        """Pairs of a token and another on its list in one of the rounds, in one order of this length.

        With `wrap`, as if no token met itself in another round.
        """
        full, rest = divmod(length, self.chunk)
        own, chunks = full * self.chunk * (self.chunk - 1) + rest * (rest - 1), full + (rest > 0)
        others = max(0, chunks * (rounds if self.wrap else 1) - 1)
        after = min(self.chunks_after, others)
        before = min(self.chunks_before, others - after if self.wrap else others)
        sizes = self.chunk, rest if rest else self.chunk

        def apart(distance: int) -> int:
            """Pairs of tokens whose chunks are this far apart."""
            if not self.wrap:
                return (chunks - 1 - distance) * sizes[0] ** 2 + sizes[0] * sizes[1]
            if distance % chunks == 0:
                return (chunks - 1) * sizes[0] ** 2 + sizes[1] ** 2
            return (chunks - 2) * sizes[0] ** 2 + 2 * sizes[0] * sizes[1]

        reached = sum(apart(distance) for side in (before, after) for distance in range(1, side + 1))
        return (own // 2 if self.causal else own) + reached

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
    same = buckets[..., :, None] == buckets[..., None, :]
    lower = buckets[..., None, :] < buckets[..., :, None]
    before = (same & earlier) if rule.per_bucket else (same & earlier) | lower
    chunk = (before & is_key[:, :, None]).sum(dim=-1) // rule.chunk
    counts = _counts_on_ring(chunk, real, rule) if rule.wrap else _counts_in_rounds(chunk, same, rule)
    counts = counts * (is_key & is_query & (earlier if rule.causal else ~itself))
    if rule.dedup:
        counts = counts.clamp_max(1)
    alone = (counts.sum(dim=-1, keepdim=True) == 0) & is_query
    return counts + (alone & itself)


def _counts_in_rounds(chunk: Tensor, same: Tensor, rule: ListRule) -> Tensor:
    """How often keys are listed, (B, H, L, L), by chunk (B, H, rounds, L); same: whether buckets are."""
    behind = chunk[..., :, None] - chunk[..., None, :]
    listed = (behind >= -rule.chunks_after) & (behind <= rule.chunks_before)
    return (listed & same if rule.per_bucket or rule.same_bucket_only else listed).sum(dim=2)


def _counts_on_ring(chunk: Tensor, real: Tensor, rule: ListRule) -> Tensor:
    """How often keys are listed, (B, H, L, L), where the chunks (B, H, rounds, L) of all rounds are a ring."""
    rounds, in_a_round = chunk.shape[2], -(-real.sum(dim=1) // rule.chunk)[:, None, None, None]
    counts = torch.zeros_like(chunk[:, :, 0, :, None] - chunk[:, :, 0, None, :])
    for own, other in product(range(rounds), repeat=2):
        behind = chunk[:, :, own, :, None] - chunk[:, :, other, None, :] + (own - other) * in_a_round
        around = (behind + rule.chunks_after) % (rounds * in_a_round).clamp_min(1)
        counts = counts + (around <= rule.chunks_before + rule.chunks_after)
    return counts
