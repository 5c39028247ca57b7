"""Synthesizer: attention whose scores are no products of queries and keys, but made of one token alone, or of none.

Tay et al. 2020, "Synthesizer: Rethinking Self-Attention in Transformer Models", arXiv:2005.00743.

    y_i = Σ_j softmax_j(Σ_c α_c s_ij) v_j W_o        j over all keys, or over j <= i; c over the components
    dense               s_ij = w_j · h_i + b_j,  h_i = relu(W x_i + b)
    random              s_ij = R_ij
    factorised_dense    s_ij = f(h_i)_{j // n} g(h_i)_{j % n},  f, g linear, n numbers in g(h_i)
    factorised_random   s_ij = r_i · r'_j
    dot_product         s_ij = q_i · k_j / √E

Cost O(L² D): only projections of queries and keys are saved, and the result is bound to positions. Memory is linear in
L beside the parameters (R has max_length² for each head): scores are made a slice of queries at a time, and again in
the backward pass.

Departures: of the two factors of factorised_dense one is tiled and the other stretched; tiled alike, as the paper draws
them, they give few different scores. Components are weighed by a softmax of learned numbers, as in the paper; the
official code knows the plain sum besides (mixing="sum"). That code leaves out b and 1 / √E and fixes lengths at 512;
Long Range Arena's forgets padding and mixes axes. R is drawn with variance 1. An invalid token takes no position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subquad.calls import check_stream_length
from subquad.costs import Cost, visible_pairs
from subquad.interface import Dims, Mixed, MixerConfig, TokenMixer, Traits
from subquad.layers.cache import KeyValueCache, empty_cache, store_keys
from subquad.layers.heads import initialise_projection
from subquad.layers.position_scores import Places, ScoreOptions, head_projection, head_projections_cost
from subquad.layers.projection import Projection
from subquad.layers.synthesis import COMPONENTS, Component, attend_slice
from subquad.mask import Mask
from subquad.ops.head_split import merge_heads, split_heads
from subquad.ops.packing import Packing
from subquad.ops.precision import full_precision
from subquad.registry import register
from subquad.state import State

SLICE_PAIRS = 2**20
"""Scores of a slice, of all examples and heads; at least one query runs at a time."""


@register("synthesizer")
@dataclass(frozen=True, kw_only=True)
class SynthesizerConfig(MixerConfig):
    """Options of the Synthesizer."""

    family: ClassVar[str] = "attention-free"
    why_not_rotary: ClassVar[str] = "its scores belong to positions"

    components: tuple[Literal["dense", "random", "factorised_dense", "factorised_random", "dot_product"], ...] = (
        "random",
    )
    """Which scores are added up: one, or a mixture, as ("random", "dot_product")."""
    mixing: Literal["learned", "sum"] = "learned"
    """Whether the components of a mixture have learned weights α that sum to 1, or weights of 1."""
    rank: int = 8
    """Width of the factors of factorised_random."""
    factor: int | None = None
    """Numbers in the stretched factor of factorised_dense; None for about √max_length."""
    trainable: bool = True
    """Whether the scores of the random components are learned; else they are fixed by (seed, layer)."""
    seed: int = 0
    """Seeds fixed random scores, together with the layer."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if not self.components or len(set(self.components)) < len(self.components):
            raise ValueError(f"synthesizer: components must be one or several different ones, got {self.components}")
        self.check_least({"rank": 1, "factor": 1, "seed": 0})

    @property
    def traits(self) -> Traits:
        """Bound to a maximal length, since scores belong to positions."""
        return Traits(bidirectional=True, causal=True, padding=True, state=True, fixed_length=True)

    def build(self, dims: Dims) -> Synthesizer:
        """The module."""
        return Synthesizer(self, dims)

    @property
    def score_options(self) -> ScoreOptions:
        """What the components need to know."""
        return ScoreOptions(rank=self.rank, factor=self.factor, trainable=self.trainable, seed=self.seed)

    @property
    def weighed(self) -> bool:
        """Whether there are weights to learn."""
        return self.mixing == "learned" and len(self.components) > 1

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections of values and results, the components, and the values of all visible pairs."""
        pairs, width = visible_pairs(length, right=0 if dims.causal else None), max(4, dtype_bytes)
        total = Cost(flops=2 * pairs * dims.inner_dim)
        for name in self.components:
            total += COMPONENTS[name].cost(self.score_options, dims, length, pairs, dtype_bytes)
        total += head_projections_cost(dims, length, dtype_bytes, count=1)  # values
        stored = (2 if "dot_product" in self.components else 1) * length if dims.causal else 0
        weights = len(self.components) if self.weighed else 0
        out_biases = dims.embed_dim if dims.bias else 0
        return total + Cost(
            flops=2 * length * dims.embed_dim * dims.inner_dim,
            activation_bytes=dtype_bytes * (length * (dims.embed_dim + dims.inner_dim) + weights),
            state_bytes=stored * dims.inner_dim * width,
            parameters=dims.embed_dim * dims.inner_dim + out_biases + weights,
        )


class Synthesizer(TokenMixer):
    """Softmax attention by synthesised scores."""

    config: SynthesizerConfig

    def __init__(self, config: SynthesizerConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        parts = {name: COMPONENTS[name](config.score_options, dims) for name in config.components}
        self.components = nn.ModuleDict(parts)
        self.mixing = nn.Parameter(torch.zeros(len(parts))) if config.weighed else None
        self.project_value = head_projection(dims)
        self.project_out = Projection(dims.inner_dim, dims.embed_dim, bias=dims.bias)
        initialise_projection(self.project_out)
        self.dropout = nn.Dropout(dims.dropout)

    def initialise(self) -> None:
        """Draw the components' tables and outer layers; a mixture begins with equal weights."""
        for component in self._parts():
            component.initialise()
        if self.mixing is not None:
            nn.init.zeros_(self.mixing)

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> KeyValueCache:
        """An empty cache; without ordinary attention in the mixture its keys have no width."""
        empty = empty_cache(self.dims, batch_size, device, dtype)
        return empty if "dot_product" in self.config.components else replace(empty, keys=empty.keys[..., :0])

    def mix(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, context_mask: Mask | None, state: State | None
    ) -> Mixed:
        """Put the valid tokens first, so that they stand where they count, and attend."""
        facts = mask or Mask()
        packing = Packing(facts.valid)
        x, facts = packing.pack(x), packing.pack_mask(facts)
        k, v, valid = self._keys(x), split_heads(self.project_value(x), self.dims.num_heads), facts.valid
        starts, after = (0,), None
        if isinstance(state, KeyValueCache):
            after, _, _ = store_keys("synthesizer", state, k, v, facts)
            check_stream_length("synthesizer", after.length, self.dims.max_length)
            k, v, valid = after.keys, after.values, None  # no query sees what is behind the stored keys
            starts = tuple(state.length.tolist())
        places = Places(starts if len(set(starts)) > 1 else (*starts, 0)[:1], x.shape[1])
        out = self._attend(x, k, v, valid, places).to(x.dtype)
        out = packing.unpack(out)
        return Mixed(self.dropout(self.project_out(merge_heads(out))), after)

    def _attend(self, x: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, places: Places) -> Tensor:
        """Slices of queries against all keys; the scores of a slice are made again in the backward pass."""
        made_of = [component.prepare(x, places) for component in self._parts()]
        weights = None if self.mixing is None else self.mixing.softmax(dim=0)
        size = max(1, SLICE_PAIRS // max(1, v.shape[0] * v.shape[1] * v.shape[2]))
        positions = torch.tensor(places.starts, device=x.device)[:, None] + torch.arange(x.shape[1], device=x.device)
        attend = partial(checkpoint, self._attend_slice, use_reentrant=False, preserve_rng_state=False)
        slices = zip(positions.split(size, dim=1), *(tensor.split(size, dim=2) for tensor in made_of), strict=True)
        return torch.cat([attend(k, v, valid, weights, *pieces) for pieces in slices], dim=2)

    def _attend_slice(
        self, k: Tensor, v: Tensor, valid: Tensor | None, weights: Tensor | None, positions: Tensor, *made_of: Tensor
    ) -> Tensor:
        """Queries at `positions` (B or 1, R) over the keys that are valid (bool (B, W)): (B, H, R, E)."""
        columns = torch.arange(v.shape[2], device=v.device)
        seen = columns <= positions[..., None] if self.dims.causal else (columns >= 0)[None, None]
        visible = seen if valid is None else seen & valid[:, None]
        with full_precision(v.device):
            return attend_slice(self._parts(), made_of, weights, visible[:, None], k, v)

    def _keys(self, x: Tensor) -> Tensor:
        """Keys (B, H, L, E) of ordinary attention; without it (B, H, L, 0)."""
        found = [keys for component in self._parts() if (keys := component.keys(x)) is not None]
        return found[0] if found else x.new_zeros(x.shape[0], self.dims.num_heads, x.shape[1], 0)

    def _parts(self) -> list[Component]:
        return cast("list[Component]", list(self.components.values()))
