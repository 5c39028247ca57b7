"""Linformer: keys and values compressed along the length to a fixed number of rows.

Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity", arXiv:2006.04768.

    y = softmax(q (P k)ᵀ / √E) (P' v) W_o        P, P': (R, L), learned

Cost O(L R D) in place of O(L² D). Never causal: a compressed row mixes all positions, and no mask on the L x R scores
repairs that.

Departures: keys and values are projected before they are compressed, as in the paper (the official code compresses x,
which differs once projections have biases); rows of invalid tokens are zeroed first, which the official code forgets.
P is drawn with variance 1 / max_length, so that compressed rows keep their scale. Shorter input uses P's first columns,
one for each valid token: an invalid token takes no position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.heads import HeadMixer, Heads, projection_cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.ops.packing import has_gaps, take, valid_first
from subquad.registry import register
from subquad.state import State


@register("linformer")
@dataclass(frozen=True, kw_only=True)
class LinformerConfig(MixerConfig):
    """Options of Linformer."""

    family: ClassVar[str] = "factorised"

    rank: int = 256
    """R, rows kept (k in the paper, where quality depends on it and not on R / L)."""
    sharing: Literal["none", "headwise", "key_value", "layerwise"] = "headwise"
    """Which P are one: each head its own P and P'; all heads share P and P'; also P = P'; also over all layers."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"linformer: rank must be at least 1, got {self.rank}")

    @property
    def traits(self) -> Traits:
        """Bound to a maximal length, since P has one column per position."""
        return Traits(bidirectional=True, cross=True, padding=True, fixed_length=True)

    def build(self, dims: Dims) -> Linformer:
        """The module."""
        return Linformer(self, dims)

    def projection_shapes(self, dims: Dims) -> tuple[int, int]:
        """Number of different P's, and heads in each."""
        heads = dims.num_heads if self.sharing == "none" else 1
        return (2 if self.sharing in ("none", "headwise") else 1), heads

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Compression of k and v, and attention of every query to R rows.

        Autograd keeps the compressed rows and the log-sum-exp besides what the projections keep.
        """
        assert dims.max_length is not None
        count, heads = self.projection_shapes(dims)
        compress = 2 * 2 * length * self.rank * dims.inner_dim
        attend = 2 * 2 * length * self.rank * dims.inner_dim
        return projection_cost(dims, length, dtype_bytes) + Cost(
            flops=compress + attend,
            activation_bytes=dtype_bytes * 2 * self.rank * dims.inner_dim
            + max(4, dtype_bytes) * dims.num_heads * length,
            parameters=count * heads * self.rank * dims.max_length,
        )


class Linformer(HeadMixer):
    """Softmax attention to compressed keys and values."""

    config: LinformerConfig

    def __init__(self, config: LinformerConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        assert dims.max_length is not None
        count, heads = config.projection_shapes(dims)
        shape = (heads, config.rank, dims.max_length)
        self.compress_key = nn.Parameter(torch.empty(shape))
        self.compress_value = nn.Parameter(torch.empty(shape)) if count == 2 else None
        self.initialise()

    def initialise(self) -> None:
        """Draw P and P' so that a compressed row has the scale of a key."""
        for compress in (self.compress_key, self.compress_value):
            if compress is not None:
                nn.init.normal_(compress, std=compress.shape[-1] ** -0.5)

    def shared_parameters(self) -> tuple[str, ...]:
        """The one P of all layers, with sharing="layerwise"."""
        return ("compress_key",) if self.config.sharing == "layerwise" else ()

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Compress, then attend; the compressed rows need no mask."""
        assert heads.k is not None
        assert heads.v is not None
        k, v, valid = heads.k, heads.v, heads.key_mask.valid
        if valid is not None:
            k, v = (tensor.masked_fill(~valid[:, None, :, None], 0.0) for tensor in (k, v))
            if has_gaps(valid):
                order = valid_first(valid)
                k, v = take(k, order), take(v, order)
        length = k.shape[2]
        compress_value = self.compress_key if self.compress_value is None else self.compress_value
        k = self.compress_key[..., :length] @ k  # (B, H, R, E)
        v = compress_value[..., :length] @ v
        return F.scaled_dot_product_attention(heads.q, k, v), None
