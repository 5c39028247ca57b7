"""Nyströmformer: softmax attention rebuilt from its rows and columns at a few landmarks, and a local convolution.

Xiong et al. 2021, "Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention", arXiv:2102.03902.

    q̃, k̃ = means of m segments of q and k      F = softmax(q k̃ᵀ / √E)  A = softmax(q̃ k̃ᵀ / √E)  B = softmax(q̃ kᵀ / √E)
    y = (F A⁺ (B v) + convolution of v along the length) W_o             A⁺: pseudo-inverse, by iteration

Cost O(L m D) beside m³ for the pseudo-inverse, which doesn't grow with the length. Rows of F A⁺ B sum to 1, but may
hold negative weights. Never causal: every landmark is a mean of tokens that come later than others which see it.

Departures: the iteration starts from the norm of each matrix; the official code takes one maximum over the whole batch
and all heads, by which the examples of a batch change each other's results. Segments differ by at most one token where
the length is no multiple of m (the official code wants one fixed length). Up to m tokens get softmax attention itself,
as in the official code for exactly m. A landmark is the mean of the valid tokens of its segment, a segment without any
is no landmark, and padding is convolved as zeros; the official code divides by the full segment and masks B alone.
Padding is put behind the tokens, but segments are laid over the padded length: padding that is added moves landmarks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.interface import Comparison, Dims, MixerConfig, Traits
from subquad.layers.heads import BY_HEADS, HeadMixer, Heads, attention_cost, projection_cost
from subquad.ops.convolution import convolve_heads
from subquad.ops.landmarks import landmark_attention
from subquad.ops.packing import Packing
from subquad.registry import register
from subquad.state import State


@register("nystromformer")
@dataclass(frozen=True, kw_only=True)
class NystromformerConfig(MixerConfig):
    """Options of Nyströmformer."""

    family: ClassVar[str] = "factorised"

    landmarks: int = 64
    """m, segments whose means stand for all queries and keys; at most as many tokens are attended exactly."""
    iterations: int = 6
    """Of the pseudo-inverse. Six leave 5e-3 of error where A is badly conditioned, twelve 3e-5."""
    kernel: int = 35
    """K, tokens under each head's convolution of the values, odd (35 in the official Long Range Arena); 0 for none."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        self.check_least({"landmarks": 1, "iterations": 1})
        if self.kernel < 0 or (self.kernel and self.kernel % 2 == 0):
            raise ValueError(
                "nystromformer: kernel counts a token and equally many on both sides, so it must be odd, or 0 for no "
                f"convolution; got {self.kernel}"
            )

    @property
    def padded_structure(self) -> str:
        """The means that are landmarks."""
        return "the segments of the landmarks"

    @property
    def traits(self) -> Traits:
        """The convolution adds to what approximates softmax attention."""
        return Traits(bidirectional=True, padding=True, approximates_softmax=self.kernel == 0)

    def comparison(self, dims: Dims, length: int) -> Comparison:
        """Without the convolution."""
        if not self.kernel:
            return super().comparison(dims, length)
        note = "Measured with kernel=0: the convolution is added to attention, and random until it is trained."
        return Comparison(replace(self, kernel=0), note=note)

    def build(self, dims: Dims) -> Nystromformer:
        """The module."""
        return Nystromformer(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """Projections, queries to landmarks, landmarks to keys, the pseudo-inverse and the convolution.

        Autograd keeps, beside what the projections keep, the result before the convolution, the landmarks of q and k,
        what these read and write, and the log-sum-exp of every row.
        """
        wide, count = max(4, dtype_bytes), self.landmarks
        mixed = Cost(
            flops=2 * length * self.kernel * dims.inner_dim,
            activation_bytes=dtype_bytes * length * dims.inner_dim if self.kernel else 0,
            parameters=dims.num_heads * self.kernel,
        )
        mixed = projection_cost(dims, length, dtype_bytes) + mixed
        if length <= count:
            return mixed + attention_cost(dims, length, length**2, dtype_bytes)
        short = count**2 * (2 * dims.head_dim + self.iterations * 4 * count) * dims.num_heads
        return (
            mixed
            + attention_cost(dims, length, 2 * length * count, dtype_bytes)
            + Cost(flops=2 * short, activation_bytes=wide * count * (4 * dims.inner_dim + dims.num_heads))
        )


class Nystromformer(HeadMixer):
    """Attention through landmarks, and a convolution of the values."""

    parting = BY_HEADS
    config: NystromformerConfig

    def __init__(self, config: NystromformerConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.kernels = nn.Parameter(torch.empty(dims.num_heads, config.kernel)) if config.kernel else None
        self.initialise()

    def initialise(self) -> None:
        """Draw the kernels as `torch.nn.Conv2d` does, uniformly up to K^(-1/2)."""
        if self.kernels is not None:
            bound = self.kernels.shape[1] ** -0.5
            nn.init.uniform_(self.kernels, -bound, bound)

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Attend with the padding behind the tokens."""
        packing = Packing(heads.mask.valid)
        q, k, v = (packing.pack(x) for x in (heads.q, *heads.keys_and_values()))
        return packing.unpack(self._attend(q, k, v, packing.valid)), None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        landmarks, iterations = self.config.landmarks, self.config.iterations
        if valid is not None:
            v = v.masked_fill(~valid[:, None, :, None], 0.0)
        if q.shape[2] > landmarks:
            out = landmark_attention(q, k, v, landmarks=landmarks, iterations=iterations, valid=valid)
        else:
            visible = None if valid is None else (valid | ~valid.any(dim=1, keepdim=True))[:, None, None]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return out if self.kernels is None else convolve_heads(v, self.kernels, out)
