"""AFT: the Attention Free Transformer, means of values weighed by keys and learned positions, in each channel alone.

Zhai et al. 2021, "An Attention Free Transformer", arXiv:2105.14103.

    y_i = (σ(q_i) ⊙ Σ_j exp(k_j + w_ij) ⊙ v_j / Σ_j exp(k_j + w_ij)) W_o        causal: j <= i
    full      w_ij = r_i · c_j, of `rank` numbers for each position
    local     the same for |i - j| <= (W - 1) / 2, causal i - j < W; else 0, so that all tokens stay in sight
    simple    w = 0
    conv      w_ij = κ_(j-i) in each head, whose channels share a key; 0 beyond the kernel. On a grid, K x K kernels

Cost O(L W D): that of local; conv likewise with its kernel, simple O(L D), full quadratic in L. Memory is linear in L.
State: the mean over tokens out of reach of the positions, and the keys and values of the W - 1 in it; of full all.
Channels are independent but for conv, so heads matter to it alone. There are no products of queries and keys.

Departures: the paper's window s is W = 2 s - 1, causal W = s. Its "N(0, 1e-2)" for r and c is taken as a standard
deviation of 0.01. Kernels are normed with the biased variance plus 1e-5. A causal conv, of distances 0..K-1 and over
prefixes, is not in the paper; a grid is bidirectional. aft-pytorch takes exponentials as they are, which overflow, and
others relative to the largest key of the sequence, whereby a later key erases earlier tokens; here neither happens. An
invalid token takes no position, but a cell of a grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from subquad.calls import check_stream_length
from subquad.costs import Cost, window_sides
from subquad.interface import Dims, Mixed, MixerConfig, TokenMixer, Traits
from subquad.layers.heads import initialise_projection
from subquad.layers.key_memory import KeyMemory, empty_memory, joined_keys, next_state
from subquad.layers.key_positions import FactorisedPositions, KernelPositions, LearnedPositions
from subquad.layers.projection import Projection
from subquad.mask import Mask
from subquad.ops.head_split import merge_heads, split_heads
from subquad.ops.means.biased_means import biased_means
from subquad.ops.means.running_means import LOG_ZERO
from subquad.ops.means.strip_geometry import BiasReach, count_pairs
from subquad.ops.packing import Packing
from subquad.ops.precision import wide_dtype
from subquad.registry import register
from subquad.state import State

FACTOR_STD = 0.01
"""Standard deviation of the vectors of positions."""


@register("aft")
@dataclass(frozen=True, kw_only=True)
class AftConfig(MixerConfig):
    """Options of the Attention Free Transformer."""

    family: ClassVar[str] = "attention-free"
    why_not_rotary: ClassVar[str] = "it has no products of queries and keys to rotate"

    kind: Literal["full", "local", "simple", "conv"] = "local"
    """Which pairs have a learned number w: all, those in a window, none, or those in each head's kernel."""
    window: int = 129
    """W, keys of a token with a learned number, itself included; odd unless causal. For kind="local"."""
    rank: int = 64
    """Numbers for each position, whose products w are; for kind="full" and "local"."""
    kernel: int = 11
    """K, keys that a kernel reaches along the sequence or each side of a grid; odd unless causal. For kind="conv"."""
    columns: int | None = None
    """Tokens in a row of the grid whose rows are the sequence; None for none. For kind="conv", bidirectional."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        self.check_least({"window": 1, "rank": 1, "kernel": 1})
        if self.columns is not None and (self.columns < 1 or self.kind != "conv"):
            raise ValueError(
                f"aft: columns counts the tokens in a row of a grid, for kind='conv' alone; got {self.columns} with "
                f"kind={self.kind!r}"
            )

    @property
    def traits(self) -> Traits:
        """Vectors of positions bind to a maximal length; only full has to remember everything."""
        line = self.columns is None
        return Traits(
            bidirectional=True,
            causal=line,
            padding=True,
            state=line,
            constant_state=line and self.kind != "full",
            fixed_length=self.kind in ("full", "local"),
        )

    def check(self, dims: Dims) -> None:
        """Two-sided windows and kernels are symmetric."""
        self.reach(causal=dims.causal)

    def reach(self, *, causal: bool) -> BiasReach:
        """Where w may differ from 0; simple has none."""
        if self.kind == "simple":
            return BiasReach(0, 0, causal)
        if self.kind == "full":
            return BiasReach(None, 0 if causal else None, causal)
        size = self.window if self.kind == "local" else self.kernel
        left, right = window_sides("aft", size, causal=causal)
        stride = 1 if self.columns is None else self.columns + 1  # rows and columns of the grid as far
        return BiasReach(left * stride, right * stride, causal)

    def key_width(self, dims: Dims) -> int:
        """Numbers of the key of a token: one for each channel, or for each head."""
        return dims.num_heads if self.kind == "conv" else dims.inner_dim

    def build(self, dims: Dims) -> Aft:
        """The module."""
        return Aft(self, dims)

    def positions(self, dims: Dims) -> LearnedPositions | None:
        """The learned numbers."""
        if self.kind == "simple":
            return None
        if self.kind == "conv":
            left, _ = window_sides("aft", self.kernel, causal=dims.causal)
            return KernelPositions(dims.num_heads, self._kernel_size, left, self.columns)
        return FactorisedPositions(dims.longest_input, self.rank, FACTOR_STD)

    @property
    def _kernel_size(self) -> int:
        return self.kernel if self.columns is None else self.kernel**2

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections, and in strips of queries the products of the positions and with values and weights.

        Autograd keeps x, q, k, v, the result, and, but for one mean for all tokens, each token's mean and its weight.
        """
        inner, keys, wide = dims.inner_dim, self.key_width(dims), max(4, dtype_bytes)
        reach, weights = self.reach(causal=dims.causal), dims.embed_dim * (3 * dims.inner_dim + self.key_width(dims))
        biases = 2 * inner + keys + dims.embed_dim if dims.bias else 0
        total = Cost(
            flops=2 * length * weights,
            activation_bytes=dtype_bytes * length * (dims.embed_dim + 3 * inner + keys),
            parameters=weights + biases,
        )
        if self.kind != "simple" or dims.causal:
            total += Cost(activation_bytes=wide * length * (inner + keys))
        if self.kind != "simple":
            pairs = count_pairs(length, reach)
            total += Cost(flops=2 * pairs * (inner + keys)) + self._position_cost(dims, pairs, wide)
        if dims.causal:
            stored = length if self.kind == "full" else reach.left or 0
            total += Cost(state_bytes=wide * (1 + stored) * (inner + keys))
        return total

    def _position_cost(self, dims: Dims, pairs: int, wide: int) -> Cost:
        """Products of vectors of positions; or normed kernels, which are kept."""
        if self.kind == "conv":
            numbers = dims.num_heads * self._kernel_size
            return Cost(activation_bytes=wide * numbers, parameters=numbers + 2 * dims.num_heads)
        return Cost(flops=2 * pairs * self.rank, parameters=2 * dims.longest_input * self.rank)


class Aft(TokenMixer):
    """Attention without products of queries and keys."""

    config: AftConfig

    def __init__(self, config: AftConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.project_query = Projection(dims.embed_dim, dims.inner_dim, bias=dims.bias)
        self.project_key = Projection(dims.embed_dim, config.key_width(dims), bias=dims.bias)
        self.project_value = Projection(dims.embed_dim, dims.inner_dim, bias=dims.bias)
        self.project_out = Projection(dims.inner_dim, dims.embed_dim, bias=dims.bias)
        for projection in (self.project_query, self.project_key, self.project_value, self.project_out):
            initialise_projection(projection)
        self.positions = config.positions(dims)
        self.dropout = nn.Dropout(dims.dropout)
        self.groups = dims.num_heads if config.kind == "conv" else 1

    def initialise(self) -> None:
        """Draw the numbers of positions."""
        if self.positions is not None:
            self.positions.initialise()

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> KeyMemory:
        """Nothing seen yet."""
        left = self.config.reach(causal=True).left
        widths = self.config.key_width(self.dims) // self.groups, self.dims.inner_dim // self.groups
        return empty_memory((batch_size, self.groups), widths, left or 0, device, dtype)

    def mix(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, context_mask: Mask | None, state: State | None
    ) -> Mixed:
        """Project, take means with the valid tokens first, project back."""
        valid = None if mask is None else mask.valid
        q, k, v = (self._split(layer(x)) for layer in (self.project_query, self.project_key, self.project_value))
        if valid is not None:
            wide = wide_dtype(k)
            k = k.to(wide).masked_fill(~valid[:, None, :, None], LOG_ZERO)
            v = v.masked_fill(~valid[:, None, :, None], 0.0)
        packing = Packing(valid if self.config.columns is None else None)  # a pixel keeps its place
        q, k, v = (packing.pack(tensor) for tensor in (q, k, v))
        starts, after = None, None
        if isinstance(state, KeyMemory):
            starts = state.length
            added = torch.full_like(starts, x.shape[1]) if valid is None else valid.sum(dim=1)
            if self.config.traits.fixed_length:
                check_stream_length("aft", starts + added, self.dims.max_length)
            k, v = joined_keys(state, k, v)
            after = next_state(state, k, v, added, self.config.reach(causal=True).left)
        stored, reach = k.shape[2] - x.shape[1], self.config.reach(causal=self.dims.causal)
        bias = None if self.positions is None else self.positions.bias(starts, x.shape[1], stored)
        out = biased_means(q, k, v, bias, reach)
        out = packing.unpack(out)
        return Mixed(self.dropout(self.project_out(merge_heads(out))), after)

    def _split(self, x: Tensor) -> Tensor:
        """(B, L, ·) -> (B, G, L, ·)."""
        return split_heads(x, self.groups)
