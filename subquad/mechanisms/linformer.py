"""Linformer: keys and values compressed along the length to a fixed number of rows.

Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity", arXiv:2006.04768.

    y = softmax(q (P k)ᵀ / √E) (P' v) W_o        P, P': (R, L), learned, or blocks of c = ⌈max_length / R⌉ tokens pooled

Cost O(L R D) in place of O(L² D). Never causal: a compressed row mixes all positions, and no mask on the L x R scores
repairs that.

Departures: keys and values are projected before they are compressed, as in the paper (the official code compresses x,
which differs once projections have biases); rows of invalid tokens are zeroed first, which the official code forgets.
P is drawn with variance 1 / max_length, so that compressed rows keep their scale. Shorter input uses P's first columns,
one for each valid token: an invalid token takes no position. Pooling and convolution, which the paper names without
details: blocks are counted over valid tokens, a last block that is not full has its own mean or maximum, one without a
token is not attended; the convolution, kernel and stride c, is one for each channel of a head. A rank that falls over
depth, as the paper proposes, is a list of mixers; with sharing="layerwise" those of equal rank share one P. The
official code can freeze P too (`trainable=False`); then P is random, as in the paper's theory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.interface import Comparison, Dims, MixerConfig, Traits
from subquad.layers.heads import HeadMixer, Heads, projection_cost
from subquad.ops.compress import block_maxima, block_means, block_sums, compress
from subquad.ops.packing import Packing
from subquad.registry import register
from subquad.state import State


@register("linformer")
@dataclass(frozen=True, kw_only=True)
class LinformerConfig(MixerConfig):
    """Options of Linformer."""

    family: ClassVar[str] = "factorised"

    rank: int | tuple[int, ...] = 256
    """R, rows kept (k in the paper, where quality depends on it and not on R / L); of blocks, at most. One for each
    head where each has a P of its own (compression="linear", sharing="none")."""
    sharing: Literal["none", "headwise", "key_value", "layerwise"] = "headwise"
    """Which P are one: each head its own P and P'; all heads share P and P'; also P = P'; also over all layers."""
    compression: Literal["linear", "mean", "max", "convolution"] = "linear"
    """By a matrix P; by the mean or the maximum of each block; by a convolution over each block."""
    trainable: bool = True
    """Whether P, or the convolution, is learned; else it stays as (seed, layer) drew it, the same in all layers with
    sharing="layerwise"."""
    seed: int = 0
    """Seeds what is not learned, together with the layer."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if any(rank < 1 for rank in self._ranks):
            raise ValueError(f"linformer: rank must be at least 1, got {self.rank}")
        if isinstance(self.rank, tuple) and (self.compression, self.sharing) != ("linear", "none"):
            raise ValueError(
                f"linformer: a rank for each head, {self.rank}, goes with compression='linear' and sharing='none' "
                f"alone, got {self.compression!r} and {self.sharing!r}; give one rank for all heads"
            )
        if not self.weighted and self.sharing != "headwise":
            raise ValueError(
                f"linformer: compression={self.compression!r} learns nothing that could be shared; leave out sharing, "
                f"got {self.sharing!r}, or choose compression='linear' or 'convolution'"
            )
        self._check_trainable()

    def _check_trainable(self) -> None:
        """Raise ValueError where nothing could be fixed, or for a seed below 0."""
        if not self.weighted and not self.trainable:
            raise ValueError(
                f"linformer: compression={self.compression!r} learns nothing that could be fixed; leave out trainable, "
                "or choose compression='linear' or 'convolution'"
            )
        self.check_least({"seed": 0})

    @property
    def _ranks(self) -> tuple[int, ...]:
        return self.rank if isinstance(self.rank, tuple) else (self.rank,)

    def check(self, dims: Dims) -> None:
        """Refuse ranks that aren't one for each head."""
        super().check(dims)
        if isinstance(self.rank, tuple) and len(self.rank) != dims.num_heads:
            raise ValueError(
                f"linformer: rank={self.rank} must have one entry for each head, expected {dims.num_heads}, "
                f"got {len(self.rank)}"
            )

    def ranks(self, num_heads: int) -> tuple[int, ...]:
        """Of each head."""
        return self._ranks * (num_heads // len(self._ranks))

    @property
    def weighted(self) -> bool:
        """Whether the compression has weights, learned or fixed."""
        return self.compression in ("linear", "convolution")

    @property
    def traits(self) -> Traits:
        """Bound to a maximal length: P has one column per position, and blocks are cut from it."""
        return Traits(bidirectional=True, cross=True, padding=True, fixed_length=True)

    def comparison(self, dims: Dims, length: int) -> Comparison:
        """Nothing is left out, but weights are random."""
        until = "until it is trained, and approximates nothing before" if self.trainable else "and stays so"
        note = f"What compresses keys and values is random {until}."
        return Comparison(self, note=note) if self.weighted else super().comparison(dims, length)

    def build(self, dims: Dims) -> Linformer:
        """The module."""
        return Linformer(self, dims)

    def block(self, dims: Dims) -> int:
        """c, tokens of a block."""
        return -(-dims.longest_input // self._ranks[0])

    def weight_shapes(self, dims: Dims) -> list[tuple[int, int, int]]:
        """Shapes of what compresses keys and, where that is something else, values; several ranks lie in one matrix."""
        if not self.weighted:
            return []
        heads = dims.num_heads if self.sharing == "none" else 1
        shape = (heads, self.block(dims), dims.head_dim)
        if self.compression == "linear":
            shape = (heads // len(self._ranks), sum(self._ranks), dims.longest_input)
        return [shape] * (2 if self.sharing in ("none", "headwise") else 1)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Compression of k and v by a matrix (by blocks it is elementwise work), and attention of every query to rows.

        Autograd keeps the compressed rows and the log-sum-exp besides what the projections keep; for means neither k
        nor v but the sizes of the blocks; otherwise blocks are kept filled up. Results of heads that attend apart are
        kept a second time, beside each other. What is not learned needs neither k, v nor their blocks.
        """
        keys = dims.key_length(length)
        blocks, linear = -(-keys // self.block(dims)), self.compression == "linear"
        rows = sum(self.ranks(dims.num_heads)) if linear else blocks * dims.num_heads  # of all heads
        kept = {"linear": 2 * keys * dims.inner_dim, "mean": 2 * blocks} if self.trainable else {self.compression: 0}
        filled = 2 * rows * self.block(dims) * dims.head_dim
        apart = length * dims.inner_dim if len(set(self._ranks)) > 1 else 0
        return projection_cost(dims, length, dtype_bytes, kept="q") + Cost(
            flops=2 * 2 * (length + (keys if linear else 0)) * rows * dims.head_dim,
            activation_bytes=dtype_bytes * (2 * rows * dims.head_dim + kept.get(self.compression, filled) + apart)
            + max(4, dtype_bytes) * dims.num_heads * length,
            parameters=sum(math.prod(shape) for shape in self.weight_shapes(dims)) if self.trainable else 0,
        )


class _Run(NamedTuple):
    """Some heads: what attends, and what compresses their keys and values."""

    q: Tensor
    k: Tensor
    v: Tensor
    of_keys: Tensor | None
    of_values: Tensor | None


class Linformer(HeadMixer):
    """Softmax attention to compressed keys and values."""

    config: LinformerConfig
    compress_key: Tensor | None
    compress_value: Tensor | None

    def __init__(self, config: LinformerConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        shapes = config.weight_shapes(dims)
        for name, shape in zip(("compress_key", "compress_value"), (*shapes, None, None), strict=False):
            if shape is not None and not config.trainable:
                self.register_buffer(name, torch.empty(shape, device="cpu"))
            else:
                self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape)))
        self._draw(None if config.trainable else self._generator())

    def initialise(self) -> None:
        """Draw what is learned."""
        if self.config.trainable:
            self._draw(None)

    def _draw(self, generator: torch.Generator | None) -> None:
        """Draw P and P', or the convolutions, so that a compressed row has the scale of a key."""
        token_dim = 2 if self.config.compression == "linear" else 1
        for weights in (self.compress_key, self.compress_value):
            if weights is not None:
                nn.init.normal_(weights, std=weights.shape[token_dim] ** -0.5, generator=generator)

    def _generator(self) -> torch.Generator:
        """Draws the same for the same seed and layer, or for all layers."""
        layer = 0 if self.config.sharing == "layerwise" else self.dims.layer
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + layer)

    def shared_parameters(self) -> tuple[str, ...]:
        """The one P of all layers, with sharing="layerwise"; one that isn't learned is drawn the same in all."""
        return ("compress_key",) if self.config.sharing == "layerwise" and self.config.trainable else ()

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Compress, then attend to the rows that hold tokens; all rows of a matrix do."""
        k, v = heads.keys_and_values()
        packing = Packing(heads.key_mask.valid)
        k, v, valid = packing.pack(k), packing.pack(v), packing.valid
        visible = None
        if valid is not None and self.config.compression != "linear":
            visible = _filled_blocks(valid, self.config.block(self.dims))[:, None, None]
        runs = self._runs(heads.q, k, v)
        out = [
            F.scaled_dot_product_attention(
                run.q, self._compress(run.k, valid, run.of_keys), self._compress(run.v, valid, run.of_values), visible
            )
            for run in runs
        ]
        return out[0] if len(out) == 1 else torch.cat(out, dim=1), None

    def _runs(self, q: Tensor, k: Tensor, v: Tensor) -> list[_Run]:
        """Neighbouring heads of equal rank, which attend together; where all ranks are equal, all heads."""
        of_keys = self.compress_key
        of_values = of_keys if self.compress_value is None else self.compress_value
        if not isinstance(self.config.rank, tuple):
            return [_Run(q, k, v, of_keys, of_values)]
        assert of_keys is not None
        assert of_values is not None
        runs = [(rank, len(list(run))) for rank, run in groupby(self.config.rank)]
        sizes = [size for _, size in runs]
        matrices = [
            [rows.unflatten(0, (size, rank)) for rows, (rank, size) in zip(split, runs, strict=True)]
            for split in (x[0].split([rank * size for rank, size in runs]) for x in (of_keys, of_values))
        ]
        return [_Run(*run) for run in zip(*(x.split(sizes, dim=1) for x in (q, k, v)), *matrices, strict=True)]

    def _compress(self, x: Tensor, valid: Tensor | None, weights: Tensor | None) -> Tensor:
        """Rows (B, H, R, E) of keys or values x (B, H, S, E), the valid ones first."""
        if self.config.compression == "mean":
            return block_means(x, self.config.block(self.dims), valid)
        if self.config.compression == "max":
            return block_maxima(x, self.config.block(self.dims), valid)
        assert weights is not None
        if self.config.compression == "convolution":
            return block_sums(x, weights.to(x.dtype), valid)
        x = x if valid is None else x.masked_fill(~valid[:, None, :, None], 0.0)
        return compress(x, weights[..., : x.shape[2]].to(x.dtype))


def _filled_blocks(valid: Tensor, size: int) -> Tensor:
    """Whether a block holds a token: bool (B, R) of valid (bool (B, S)), in which the valid ones come first.

    Where no token is valid, all blocks hold zeros and are attended.
    """
    filled = valid[:, ::size]
    return filled | ~filled[:, :1]
