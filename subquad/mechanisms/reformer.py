"""Reformer: attention among tokens that random hashes put into the same bucket, with queries and keys in one.

Kitaev et al. 2020, "Reformer: The Efficient Transformer", arXiv:2001.04451, section 2.

    q_j = x_j W_qk       k_j = q_j / |q_j|       bucket_r(j) = argmax [q_j R_r; -q_j R_r], in each of n rounds
    o_i = softmax over the tokens j on i's lists of q_i · k_j

In each round the tokens are sorted by bucket and the order is cut into chunks of m; the list of a token is its chunk, b
chunks before it and a behind it, by default one and none. Rounds are merged by their log-sum-exp, as if their lists
were one. A token attends to itself only where nothing else is on its lists. No gradient flows through the hash.

    chunks="bucket": every bucket is cut by itself, by rank; all chunks of a list are of the token's bucket.

Cost O(L n m D (1 + b + a)), and L log L for sorting. The causal form needs chunks="bucket" and a = 0: in one order of
all buckets a later token moves the borders of the chunks behind it. State, of that form alone: all keys, values and
buckets so far; a token costs O(n L + L D).

Departures: by default a chunk's tokens of other buckets are seen, and a token counts as often as it is listed, as in
the official code (trax) and in Hugging Face, which makes the price independent of the data; the paper compares buckets
(`same_bucket_only`) and discounts repetitions (`dedup`). Lists end with their round, as in the paper; in both codes the
chunks of all rounds are a ring (`wrap`). A ring that is shorter than a list is listed once; theirs list chunks of it
twice. Scores are q_i · k_j without 1 / √E, as in both. Rotations are drawn once, from (seed, layer), and saved with the
model; the paper draws them in every step. The shared projection is computed in float32 or wider, since rounding moves
tokens to other buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.costs import Cost
from subquad.interface import Comparison, Dims, MixerConfig, Traits
from subquad.layers.cache import KeyValueCache, empty_cache, store_keys
from subquad.layers.heads import HeadMixer, Heads
from subquad.mask import Mask
from subquad.ops.lsh.attention import continue_in_buckets, list_rule
from subquad.ops.lsh.hash import (
    LARGEST_FACTOR,
    check_buckets,
    derived_factors,
    hash_into_buckets,
    num_buckets,
    random_rotations,
    rotation_columns,
)
from subquad.ops.lsh.lists import ListRule
from subquad.ops.lsh.tiles import attend_in_buckets
from subquad.ops.packing import append
from subquad.ops.precision import full_precision, wide_dtype
from subquad.ops.projection import project
from subquad.registry import register
from subquad.state import State, state_dataclass

BUCKETS = 64
"""Count for chunks="bucket", where it must not depend on the length, unless another is given."""


@register("reformer")
@dataclass(frozen=True, kw_only=True)
class ReformerConfig(MixerConfig):
    """Options of LSH attention."""

    family: ClassVar[str] = "sparse"
    why_not_causal: ClassVar[str] = (
        "With chunks='global' a later token moves the borders of the chunks in the sorted order, and with chunks_after "
        "above 0 the chunks behind a token's own hold later ones; use chunks='bucket' and chunks_after=0"
    )

    rounds: int = 4
    """n, hashes; each adds a list."""
    eval_rounds: int | None = None
    """Hashes in evaluation, where more cost less than in training; None for `rounds`."""
    chunk: int = 64
    """m, tokens of a chunk."""
    chunks_before: int = 1
    """b, chunks before its own that a token sees."""
    chunks_after: int = 0
    """a, chunks behind its own that a token sees; there is no causal form with any."""
    buckets: int | tuple[int, ...] | None = None
    """Count of buckets, 1 or even, or factors of it; None for 2 L / m as a power of 2, with chunks="bucket" for 64."""
    chunks: Literal["global", "bucket"] = "global"
    """Cut the order of all tokens, or every bucket by itself."""
    same_bucket_only: bool = False
    """A chunk's tokens of other buckets are not seen; with chunks="bucket" there are none."""
    dedup: bool = False
    """A token that is listed in several rounds counts once."""
    wrap: bool = False
    """The rounds, one behind the other, are a ring: before a round's first chunk comes the last of the round before."""
    seed: int = 0
    """Seeds the rotations, together with the layer."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        for name, rounds in (("rounds", self.rounds), ("eval_rounds", self.eval_rounds)):
            if rounds is not None and rounds < 1:
                raise ValueError(f"reformer: {name} counts the hashes and must be at least 1, got {rounds}")
        self.check_least({"seed": 0})
        self.rule(causal=False)
        check_buckets("reformer", self.factors(0))

    @property
    def traits(self) -> Traits:
        """Chunks inside buckets and before the own depend on nothing that comes later, and on no other document."""
        inside = self.chunks == "bucket"
        causal = inside and not self.chunks_after
        return Traits(bidirectional=True, causal=causal, padding=True, segments=inside, state=causal)

    @property
    def padded_structure(self) -> str:
        """A count of buckets that follows from the length."""
        return "the count of buckets" if self.buckets is None and self.chunks == "global" else ""

    def rule(self, *, causal: bool) -> ListRule:
        """How lists are made."""
        options = (self.same_bucket_only, self.dedup, self.wrap, self.chunks_before, self.chunks_after)
        return list_rule("reformer", self.chunk, self.chunks, causal, *options)

    def factors(self, length: int) -> tuple[int, ...]:
        """The count of buckets for a length."""
        if self.buckets is None:
            return (BUCKETS,) if self.chunks == "bucket" else derived_factors(length, self.chunk)
        return (self.buckets,) if isinstance(self.buckets, int) else self.buckets

    @property
    def most_rounds(self) -> int:
        """Rounds for which there are rotations."""
        return max(self.rounds, self.eval_rounds or 0)

    @property
    def columns(self) -> int:
        """Columns of a rotation, enough for every length."""
        derived = self.buckets is None and self.chunks == "global"
        return LARGEST_FACTOR if derived else rotation_columns(self.factors(0))

    def comparison(self, dims: Dims, length: int) -> Comparison:
        """Held against one chunk that holds everything."""
        exact = ReformerConfig(rounds=1, chunk=length, buckets=1, chunks=self.chunks)
        note = (
            "Queries are keys too, of unit length, so k isn't read; softmax is over all visible tokens but the query's "
            "own."
        )
        return Comparison(self, exact, note)

    def build(self, dims: Dims) -> Reformer:
        """The module."""
        return Reformer(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Three projections, hashes, and the pairs of the lists, as if all buckets were equally full.

        Autograd keeps x, the shared vectors, values, result and log-sum-exp. In a narrow dtype the shared vectors, and
        what they are projected from, are kept wide.
        """
        inner, weights, wide = dims.inner_dim, dims.embed_dim * dims.inner_dim, max(4, dtype_bytes)
        hashes = length * inner * rotation_columns(self.factors(length))
        kept = dtype_bytes * length * (dims.embed_dim + 2 * inner) + wide * length * (inner + dims.num_heads)
        widened = 0 if wide == dtype_bytes else wide * (length * dims.embed_dim + weights)
        rule = self.rule(causal=dims.causal)
        pairs = rule.different_rounds(self.rounds, length) * self._pairs(rule, length)
        return Cost(
            flops=2 * (3 * length * weights + self.rounds * hashes + pairs * 2 * inner),
            activation_bytes=kept + widened,
            state_bytes=2 * length * inner * wide if dims.causal else 0,
            parameters=3 * weights + (2 * inner + dims.embed_dim if dims.bias else 0),
        )

    def _pairs(self, rule: ListRule, length: int) -> int:
        """Pairs of a token and another on its list, in one round."""
        count = num_buckets(self.factors(length)) if self.chunks == "bucket" else 1
        shorter, longer_ones = divmod(length, count)
        rounds = rule.different_rounds(self.rounds, length)
        of_shorter, of_longer = (rule.listed_pairs(rounds, tokens) for tokens in (shorter, shorter + 1))
        return (count - longer_ones) * of_shorter + longer_ones * of_longer


@state_dataclass
class BucketCache(KeyValueCache):
    """All tokens so far, and their buckets.

    Attributes:
        length: int64 (B,).
        keys: (B, H, T, E), the shared vectors.
        values: (B, H, T, E).
        segments: int64 (B, T).
        buckets: int64 (B, H, T, rounds).
    """

    buckets: Tensor


class Reformer(HeadMixer):
    """LSH attention."""

    config: ReformerConfig
    rotations: Tensor

    def __init__(self, config: ReformerConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        del self.project_key  # `project_query` projects both
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + dims.layer)
        shape = (config.most_rounds, dims.num_heads, dims.head_dim, config.columns)
        rotations = random_rotations(*shape, generator=generator)
        self.register_buffer("rotations", rotations.to(self.project_query.weight.dtype))

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> BucketCache:
        """Nothing seen yet."""
        empty = empty_cache(self.dims, batch_size, device, dtype)
        buckets = empty.length.new_zeros(batch_size, self.dims.num_heads, 0, self.config.most_rounds)
        return BucketCache(empty.length, empty.keys, empty.values, empty.segments, buckets)

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Queries and keys in one, never narrowed, and values."""
        wide, layer = wide_dtype(x), self.project_query
        with full_precision(x.device):
            bias = None if layer.bias is None else layer.bias.to(wide)
            shared = self.split(project(x.to(wide), layer.weight.to(wide), bias))
        return shared, shared, self.split(self.project_value(x))

    def rotate_heads(
        self, q: Tensor, k: Tensor | None, mask: Mask | None, key_mask: Mask | None, state: State | None
    ) -> tuple[Tensor, Tensor | None]:
        """Only what attends is rotated: buckets tell content, and not the position in a stream."""
        return super().rotate_heads(q, None, mask, key_mask, state)[0], k

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Hash, then attend in buckets; a stream's later calls to what is stored."""
        k, v = heads.keys_and_values()
        factors, rule = self.config.factors(heads.q.shape[2]), self.config.rule(causal=self.dims.causal)
        rounds = self.config.rounds if self.training else self.config.eval_rounds or self.config.rounds
        hashed = rounds if state is None else self.config.most_rounds  # a state serves training and evaluation
        buckets, segments = hash_into_buckets(k, self.rotations[:hashed], factors), heads.mask.segments
        if isinstance(state, BucketCache):
            stored, columns, segments = self._store(heads.q, v, buckets, heads.mask, state)
            if state.keys.shape[2]:
                own = _by_document(buckets, segments, factors)[:, :, :rounds]
                others = _by_document(stored.buckets.transpose(2, 3), stored.segments, factors)[:, :, :rounds]
                keys, values = stored.keys.to(heads.q.dtype), stored.values.to(v.dtype)
                return continue_in_buckets(heads.q, keys, values, own, others, columns, rule), stored
            state = stored
        if segments is not None:
            numbers = F.pad(segments.diff(dim=1) != 0, (1, 0)).cumsum(dim=1)
            buckets = _by_document(buckets, numbers, factors)
        return attend_in_buckets(heads.q, v, buckets[:, :, :rounds], rule, heads.mask.valid), state

    def _store(
        self, shared: Tensor, v: Tensor, buckets: Tensor, mask: Mask, state: BucketCache
    ) -> tuple[BucketCache, Tensor, Tensor]:
        """The longer cache, and the column and the segment (B, L) of each token of this call."""
        cache, columns, segments = store_keys("reformer", state, shared, v, mask)
        capacity = cache.keys.shape[2]
        targets = columns if mask.valid is None else columns.masked_fill(~mask.valid, capacity)
        stored = append(state.buckets, buckets.transpose(2, 3), targets, capacity)
        columns = columns.clamp_max(capacity - 1)  # of an invalid token that begins a call
        return BucketCache(cache.length, cache.keys, cache.values, cache.segments, stored), columns, segments


def _by_document(buckets: Tensor, segments: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Buckets (B, H, rounds, L), made different ones in different segments (B, L)."""
    return buckets + num_buckets(factors) * segments[:, None, None]
