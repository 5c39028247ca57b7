"""Routing Transformer: attention inside clusters of queries and keys, found by k-means as training goes.

Roy et al. 2020, "Efficient Content-Based Sparse Attention with Routing Transformers", arXiv:2003.05997.

    q, k standardised (layer norm without parameters);    μ_1..μ_C centroids, for each head
    bidirectional: of each centroid, the w queries and the w keys with the largest products with it;
        o_i = 1 / (n_i + ε) Σ_{the n_i clusters of query i} softmax over the keys of the cluster of q_i · k_j, times v_j
    causal, q = k: c(i) = argmax_c q_i · μ_c;
        o_i = 1 / (1 + ε) softmax over the last w tokens j <= i with c(j) = c(i) of q_i · k_j, times v_j

Cost O(L (C + w) D); with C = L / w clusters, and w = √L, O(L √L D). A query in no cluster gives 0. In training the
centroids move: by moving averages of the counts and sums of the vectors nearest to each, queries and keys alike. They
are buffers, saved with the model, and float32 or wider in a model of any dtype, since their steps are small. A step
that the backward pass runs again repeats its choices and moves them once: any step of a model; by itself inside
`torch.utils.checkpoint`, this layer repeats its latest step alone. The auxiliary loss draws vectors to their centroids:
β mean |x - μ_c(x)|². State, of the causal form: the last w - 1 keys and values of each cluster.

Departures: the official code takes the top w tokens of a causal sequence too, which tells a token which later ones will
come; the causal form above knows of earlier tokens only. Averages start from one token at each centroid. Relative
positions by rank in the cluster and memory slots are not part of this layer. Nor is local attention in half of the
heads, as the released models have it: a window by distance with a state of its own would be a second mechanism that
shares the projections alone; give a list of `local` and this over the layers. Scores are not divided by √E, as in the
official code: `scaled`. Choices are constants to the gradient. Padding is taken out first and takes no position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from subquad.costs import Cost, visible_pairs
from subquad.interface import Comparison, Dims, MixerConfig, Traits
from subquad.layers.heads import Attended, HeadMixer, Heads, projection_cost
from subquad.layers.wide_buffers import WideBuffers
from subquad.mask import Mask
from subquad.ops.backward_pass import is_recomputing
from subquad.ops.clusters.causal_window import cluster_window_attention
from subquad.ops.clusters.kmeans import Centroids, commitment, members, moved, nearest, standardise
from subquad.ops.clusters.member_attention import member_attention
from subquad.ops.clusters.rings import RingOrder, Rings
from subquad.ops.packing import Packing, token_counts
from subquad.ops.precision import full_precision, wide_dtype
from subquad.ops.projection import project
from subquad.ops.rotary import rotate
from subquad.registry import register
from subquad.state import State, state_dataclass


@register("routing")
@dataclass(frozen=True, kw_only=True)
class RoutingConfig(MixerConfig):
    """Options of the Routing Transformer."""

    family: ClassVar[str] = "sparse"

    clusters: int = 16
    """C, centroids of each head."""
    window: int = 128
    """w, tokens of a cluster: bidirectional its top ones, causal the last ones, the token itself included."""
    shared: bool | None = None
    """q = k, by one projection; None for the paper's choice: when causal, which needs it."""
    scaled: bool = False
    """Divide scores by √E."""
    epsilon: float = 1e-2
    """ε, added to the number of clusters of a token."""
    decay: float = 0.999
    """Of the moving averages."""
    commitment: float = 1e-4
    """β, weight of the auxiliary loss."""
    seed: int = 0
    """Seeds the first centroids, together with the layer."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        self.check_least({"clusters": 1, "window": 1, "epsilon": 0, "commitment": 0, "seed": 0})
        if not 0 <= self.decay <= 1:
            raise ValueError(f"routing: decay must be in [0, 1], got {self.decay}")

    @property
    def traits(self) -> Traits:
        """Causal where q = k: a query's cluster is then that of its key."""
        causal = self.shared is not False
        return Traits(
            bidirectional=True, causal=causal, padding=True, state=causal, constant_state=causal, aux_loss=True
        )

    def shares(self, dims: Dims) -> bool:
        """Whether q = k."""
        return dims.causal if self.shared is None else self.shared

    def comparison(self, dims: Dims, length: int) -> Comparison:
        """Where q = k held against one cluster that holds everything."""
        note = "Centroids are random until they are trained."
        if not self.shares(dims):
            return Comparison(self, note=note)
        exact = replace(self, clusters=1, window=length, epsilon=0.0)
        return Comparison(self, exact, "Queries are keys too, standardised, so k isn't read; centroids are random.")

    def build(self, dims: Dims) -> Routing:
        """The module."""
        return Routing(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections, products with the centroids, and attention.

        Causal attention is priced as the window in the order of the clusters, whoever is in it. Autograd keeps
        standardised q and k, v, the deviations of q and k, and, causal, the log-sum-exp; for the auxiliary loss the
        centroids, once for the whole batch.
        """
        sets, wide, inner = 1 if self.shares(dims) else 2, max(4, dtype_bytes), dims.inner_dim
        size = min(self.window, length)
        pairs = visible_pairs(length, left=self.window - 1, right=0) if dims.causal else self.clusters * size**2
        kept = sets * inner + (sets + dims.causal) * dims.num_heads
        copies = 0 if dtype_bytes >= 4 else wide * dims.embed_dim * (length + sets * inner)
        spared = 2 - sets  # projections
        return projection_cost(dims, length, dtype_bytes, kept="v") + Cost(
            flops=2 * inner * (sets * length * self.clusters + 2 * pairs - spared * length * dims.embed_dim),
            activation_bytes=wide * length * kept + copies + wide * sets * self.clusters * inner,
            state_bytes=2 * wide * self.clusters * (self.window - 1) * inner if dims.causal else 0,
            parameters=-spared * inner * (dims.embed_dim + dims.bias),
        )


@state_dataclass
class RoutingState(State):
    """The last members of each cluster, the newest in the last column; columns that hold none are zeros.

    Attributes:
        length: int64 (B,).
        members: int64 (B, H, C), columns that hold one.
        keys: (B, H, C, w - 1, E).
        values: (B, H, C, w - 1, E).
    """

    members: Tensor
    keys: Tensor
    values: Tensor


class Routing(WideBuffers, HeadMixer):
    """Attention inside clusters."""

    config: RoutingConfig
    means: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, config: RoutingConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        if config.shares(dims):
            del self.project_key
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + dims.layer)
        means = torch.randn(dims.num_heads, config.clusters, dims.head_dim, generator=generator, device="cpu")
        means = standardise(means.to(wide_dtype(self.project_query.weight)))
        self.register_buffer("means", means)
        self.register_buffer("counts", torch.ones_like(means[..., 0]))
        self.register_buffer("sums", means.clone())
        self._latest: tuple[Tensor, Tensor] | None = None  # the buffer of means moved last, and what it held before

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> RoutingState:
        """Nothing seen yet."""
        config, heads = self.config, self.dims.num_heads
        shape = (batch_size, heads, config.clusters, config.window - 1, self.dims.head_dim)
        keys = torch.zeros(shape, device=device, dtype=dtype)
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return RoutingState(length, length.new_zeros(batch_size, heads, config.clusters), keys, keys.clone())

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Standardised queries and keys, the same where they are shared, and values.

        A rounded vector may fall to another cluster: queries and keys are float32 or wider, autocast or not.
        """
        wide = x.to(wide_dtype(x))
        with full_precision(x.device):
            q = standardise(self.split(_linear(wide, self.project_query)))
            k = q if self.config.shares(self.dims) else standardise(self.split(_linear(wide, self.project_key)))
        return q, k, self.split(self.project_value(x))

    def rotate_heads(
        self, q: Tensor, k: Tensor | None, mask: Mask | None, key_mask: Mask | None, state: State | None
    ) -> tuple[Tensor, Tensor | None]:
        """Not yet: clusters are found by content."""
        del mask, key_mask, state
        return q, k

    def attend(self, heads: Heads, state: State | None) -> Attended:
        """Attend inside the clusters, and in training let the centroids move; padding is taken out first."""
        before = state if isinstance(state, RoutingState) else None
        k, v = heads.keys_and_values()
        packing = Packing(heads.mask.valid)
        sets = [packing.pack(x) for x in ([k] if k is heads.q else [heads.q, k])]
        q, v, valid = sets[0], packing.pack(v), packing.valid
        lengths = token_counts(q, valid)
        means, after = self._means_found(), None
        with full_precision(q.device):
            if before is not None:
                out, labels, after = self._continue(q, v, means, valid, before)
            elif self.dims.causal:
                out, labels = self._attend_causal(q, v, means, valid)
            else:
                out, labels = self._attend_members(sets, v, means, lengths)
            loss = self._learn(sets, labels, means, lengths) if self.training else None
        return Attended(packing.unpack(out), after, loss)

    def _means_found(self) -> Tensor:
        """The centroids as this call found them, also where it is run again and they were not put back since."""
        buffer, before = self._latest or (None, self.means)
        return before if buffer is self.means and self.training and is_recomputing() else self.means

    @property
    def _scale(self) -> float:
        return self.dims.head_dim**-0.5 if self.config.scaled else 1.0

    def _rotated(self, sets: list[Tensor], start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries and keys, with rotary positions rotated."""
        if self.dims.positions == "rotary":
            places = torch.arange(sets[0].shape[2], device=sets[0].device)[None]
            places = places if start is None else places + start[:, None]
            sets = [rotate(x, places) for x in sets]
        return sets[0], sets[-1]

    def _attend_causal(
        self, q: Tensor, v: Tensor, means: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, list[list[Tensor]]]:
        labels, (q, k) = nearest(q, means), self._rotated([q])
        v = v / (1 + self.config.epsilon)
        out = cluster_window_attention(q, k, v, labels, self.config.window, scale=self._scale, valid=valid)
        return out, [list(labels)]

    def _continue(
        self, q: Tensor, v: Tensor, means: Tensor, valid: Tensor | None, before: RoutingState
    ) -> tuple[Tensor, list[list[Tensor]], RoutingState]:
        labels, (q, k) = nearest(q, means), self._rotated([q], before.length)
        rings = Rings(before.members, before.keys.to(q.dtype), before.values.to(q.dtype))
        order = RingOrder(rings, k, v.to(q.dtype), labels, valid)
        if bool(before.length.any()):
            out = order.attend(q, self._scale)
        else:
            out = cluster_window_attention(q, k, v, labels, self.config.window, scale=self._scale, valid=valid)
        rings = order.newest()
        added, dtype = q.shape[2] if valid is None else valid.sum(dim=1), before.keys.dtype
        after = RoutingState(before.length + added, rings.members, rings.keys.to(dtype), rings.values.to(dtype))
        return out / (1 + self.config.epsilon), [list(labels)], after

    def _attend_members(
        self, sets: list[Tensor], v: Tensor, means: Tensor, lengths: list[int]
    ) -> tuple[Tensor, list[list[Tensor]]]:
        chosen, labels = [], []
        for x in sets:
            of_examples = [
                members(example[:, :length], means, min(self.config.window, length))
                for example, length in zip(x, lengths, strict=True)
            ]
            chosen.append([found for found, _ in of_examples])
            labels.append([label for _, label in of_examples])
        q, k = self._rotated(sets)
        out = member_attention(q, k, v, chosen[0], chosen[-1], scale=self._scale, epsilon=self.config.epsilon)
        return out, labels

    def _learn(self, sets: list[Tensor], labels: list[list[Tensor]], means: Tensor, lengths: list[int]) -> Tensor:
        """The auxiliary loss by the centroids as they are; then move them, unless the step is only computed again."""
        losses = [commitment(x, means, label, lengths) for x, label in zip(sets, labels, strict=True)]
        if not is_recomputing():
            self._latest = self.means, self.means.clone()
            centroids = Centroids(self.means, self.counts, self.sums)
            after = moved(centroids, [x.detach() for x in sets], labels, lengths, self.config.decay)
            for buffer, value in zip(centroids, after, strict=True):
                buffer.copy_(value)
        return self.config.commitment * torch.stack(losses).mean()


def _linear(x: Tensor, projection: nn.Linear) -> Tensor:
    """The projection in the dtype of x."""
    bias = None if projection.bias is None else projection.bias.to(x.dtype)
    return project(x, projection.weight.to(x.dtype), bias)
