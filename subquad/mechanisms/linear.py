"""Linear: attention with the kernel φ(q)·φ(k), φ = elu + 1, in place of the softmax; causally, a recurrent network.

Katharopoulos et al. 2020, "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
arXiv:2006.16236.

    o_i = φ(q_i)ᵀ S / (φ(q_i)ᵀ z + ε)        S = Σ_j φ(k_j) v_jᵀ, z = Σ_j φ(k_j)        causal: j <= i

Cost O(L E D) time, O(E D) state. No 1/√E and no normalisation of q and k. It does not approximate softmax attention.

Departures: φ is computed as exp(x) below 0, where the official `elu(x) + 1` cancels to 0 in low precision; sums are
kept in float32 or wider; the causal form runs in chunks, exactly, where the official code scans token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from subquad.costs import Cost
from subquad.heads import HeadMixer, Heads, projection_cost
from subquad.interface import Dims, MixerConfig, Traits
from subquad.ops.features import elu_plus_one
from subquad.ops.linear import Sums, all_sums, causal_sums, read_sums, zero_keys
from subquad.ops.precision import full_precision
from subquad.registry import register
from subquad.state import State, state_dataclass


@register("linear")
@dataclass(frozen=True, kw_only=True)
class LinearConfig(MixerConfig):
    """Options of the Linear Transformer."""

    family: ClassVar[str] = "factorised"

    chunk: int = 64
    """Tokens per chunk of the causal form: speed only, the result doesn't depend on it."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.chunk < 1:
            raise ValueError(f"linear: chunk must be at least 1, got {self.chunk}")

    @property
    def traits(self) -> Traits:
        """Sums over all keys can't tell documents apart, hence no segments."""
        return Traits(bidirectional=True, causal=True, cross=True, padding=True, state=True, constant_state=True)

    def build(self, dims: Dims) -> Linear:
        """The module."""
        return Linear(self, dims)

    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """One E x E product per token and head to write the sums and one to read them, and E for the denominator.

        The causal form adds the pairs inside its chunks. Autograd keeps, besides the projections, q, k and φ of both,
        v, the sums (one for each chunk), the pairs inside chunks, and the fraction. A context is as long as x.
        """
        inner, heads, width = dims.inner_dim, dims.num_heads, dims.head_dim
        wide_bytes, sums = max(4, dtype_bytes), inner * (width + 1)
        if dims.causal:
            chunk = max(1, min(self.chunk, length))
            chunks = -(-length // chunk)
            tokens = chunks * chunk  # the last chunk is filled up
            pairs = tokens * chunk
            stored_sums = max(2, chunks)  # those before each chunk; with one chunk those after it share their memory
            kept = 4 * length * inner + tokens * (4 * inner + heads) + pairs * heads + stored_sums * sums
        else:
            tokens, pairs = length, 0
            kept = length * (8 * inner + heads) + sums
        return projection_cost(dims, length, dtype_bytes, kept=0) + Cost(
            flops=2 * tokens * inner * (2 * width + 1) + 2 * 2 * pairs * inner,
            activation_bytes=wide_bytes * kept,
            state_bytes=wide_bytes * sums if dims.causal or dims.cross else 0,
        )


@state_dataclass
class LinearState(State):
    """The sums over everything seen.

    Attributes:
        length: int64 (B,), valid tokens of x so far.
        filled: bool (B,), cross-attention: whether the context has been summed.
        values: (B, H, E, E), S.
        features: (B, H, E), z.
    """

    filled: Tensor
    values: Tensor
    features: Tensor


class Linear(HeadMixer):
    """Linear attention with φ = elu + 1."""

    config: LinearConfig

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> LinearState:
        """All sums 0."""
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        features = torch.zeros(batch_size, self.dims.num_heads, self.dims.head_dim, device=device, dtype=dtype)
        values = features[..., None].expand(-1, -1, -1, self.dims.head_dim).clone()
        return LinearState(length, length > 0, values, features)

    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        """Sum keys and values, read with the queries; never narrowed by autocast."""
        with full_precision(heads.q.device):
            return self._attend_wide(heads, state)

    def _attend_wide(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        wide = torch.promote_types(heads.q.dtype, torch.float32)
        q = elu_plus_one(heads.q.to(wide))
        before = None
        if isinstance(state, LinearState):
            before = Sums(state.values.to(wide), state.features.to(wide))
        if heads.k is None or heads.v is None:
            return self._read_context(q, before, heads, state)
        k = zero_keys(elu_plus_one(heads.k.to(wide)), heads.key_mask.valid)
        if self.dims.causal:
            out, after = causal_sums(q, k, heads.v.to(wide), before, chunk=self.config.chunk)
        else:
            after = all_sums(k, heads.v.to(wide))
            out = read_sums(q, after)
        if not isinstance(state, LinearState):
            return out, None
        if self.dims.cross and state.filled.numel() and bool(state.filled.all()):
            raise ValueError("linear: the state holds a context already; pass context=None, or begin with a new state")
        return out, _advance(state, heads, after)

    def _read_context(
        self, q: Tensor, sums: Sums | None, heads: Heads, state: State | None
    ) -> tuple[Tensor, State | None]:
        assert isinstance(state, LinearState)
        assert sums is not None
        if not bool(state.filled.all()):
            raise ValueError("linear: the state holds no context yet; pass context (B, S, D) in the first call")
        return read_sums(q, sums), _advance(state, heads, sums)


def _advance(state: LinearState, heads: Heads, sums: Sums) -> LinearState:
    length, valid = heads.q.shape[2], heads.mask.valid
    dtype = state.values.dtype
    return LinearState(
        state.length + (length if valid is None else valid.sum(dim=1)),
        torch.ones_like(state.filled),
        sums.values.to(dtype),
        sums.features.to(dtype),
    )
