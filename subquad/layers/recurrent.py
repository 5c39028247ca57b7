"""The base of linear recurrences with decay: projections into heads, the recurrence, a norm and a gate, and back.

    q, k, v = x W_q, x W_k, x W_v        out = (norm(recurrence(q, k, v)) ⊙ swish(x W_g)) W_o

Heads of queries and keys may be of another width than those of values. A mechanism derived from `RecurrentMixer` writes
one method, `recur`. The norm is taken over each head of each token.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.interface import Dims, Mixed, MixerConfig, TokenMixer
from subquad.layers.heads import initialise_projection
from subquad.layers.projection import Projection
from subquad.mask import Mask
from subquad.ops.head_split import split_heads
from subquad.ops.precision import wide_dtype
from subquad.ops.recomputed import recomputed
from subquad.ops.recurrence.chunks import chunk_size, segment_chunks
from subquad.ops.recurrence.linear import recurrence
from subquad.state import State, state_dataclass

NORM_EPSILON = 1e-5
"""Added to the mean square of a head."""


@dataclass(frozen=True, kw_only=True)
class RecurrentHeads:
    """The heads of a recurrence.

    Attributes:
        width: E, of queries and keys.
        value_width: Ev, of values and results.
        centred: whether the norm subtracts the mean too (GroupNorm with a group for each head) or not (RMSNorm).
        gain: whether the norm has a learned gain for each channel, the same in all heads.
        gate: whether the normed result is multiplied by swish of a projection of x.
        chunk: tokens per chunk.
    """

    width: int
    value_width: int
    centred: bool
    gain: bool
    gate: bool
    chunk: int


@state_dataclass
class RecurrentState(State):
    """What a recurrence remembers.

    Attributes:
        length: int64 (B,).
        matrix: (B, H, E, Ev).
    """

    matrix: Tensor


class RecurrentMixer(TokenMixer):
    """Projects into heads, calls `recur`, norms, gates and projects back; causal."""

    def __init__(self, config: MixerConfig, dims: Dims, heads: RecurrentHeads) -> None:
        super().__init__(config, dims)
        self.heads = heads
        keys, values = dims.num_heads * heads.width, dims.num_heads * heads.value_width
        self.project_query = Projection(dims.embed_dim, keys, bias=dims.bias)
        self.project_key = Projection(dims.embed_dim, keys, bias=dims.bias)
        self.project_value = Projection(dims.embed_dim, values, bias=dims.bias)
        self.project_gate = Projection(dims.embed_dim, values, bias=dims.bias) if heads.gate else None
        self.project_out = Projection(values, dims.embed_dim, bias=dims.bias)
        self.norm_gain = nn.Parameter(torch.ones(heads.value_width)) if heads.gain else None
        self.dropout = nn.Dropout(dims.dropout)
        for projection in self.children():
            if isinstance(projection, nn.Linear):
                initialise_projection(projection)

    @abstractmethod
    def recur(
        self, x: Tensor, qkv: tuple[Tensor, Tensor, Tensor], mask: Mask, state: State | None
    ) -> tuple[Tensor, State | None]:
        """The recurrence.

        Args:
            x: (B, L, D), the stream.
            qkv: its projections, (B, L, H * E) twice and (B, L, H * Ev).
            mask: facts about the tokens.
            state: what earlier tokens left, or None.

        Returns:
            The result (B, H, L, Ev), float32 or wider, and the new state when one was given.
        """

    def mix(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, context_mask: Mask | None, state: State | None
    ) -> Mixed:
        """Project, recur, norm, gate, project back."""
        qkv = (self.project_query(x), self.project_key(x), self.project_value(x))
        out, after = self.recur(x, qkv, mask or Mask(), state)
        y = self.project_out(self._norm_and_gate(out.transpose(1, 2), x).to(x.dtype))
        return Mixed(self.dropout(y), after)

    def initialise(self) -> None:
        """A gain of 1."""
        if self.norm_gain is not None:
            nn.init.ones_(self.norm_gain)

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """Nothing seen yet."""
        return RecurrentState(*self.empty_memory(batch_size, device, dtype))

    def empty_memory(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Length 0 and a matrix of zeros."""
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        shape = (batch_size, self.dims.num_heads, self.heads.width, self.heads.value_width)
        return length, torch.zeros(shape, device=device, dtype=dtype)

    def run_recurrence(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        mask: Mask,
        state: State | None,
        *,
        beta: Tensor | None = None,
    ) -> tuple[Tensor, RecurrentState | None]:
        """The recurrence on heads, from the state on; arguments and result as in `recurrence` and `recur`."""
        before = state if isinstance(state, RecurrentState) else None
        matrix = None if before is None else before.matrix
        out, after = recurrence(q, k, v, log_decay, beta=beta, before=matrix, valid=mask.valid, chunk=self.heads.chunk)
        if before is None:
            return out, None
        length = before.length + (q.shape[2] if mask.valid is None else mask.valid.sum(dim=1))
        return out, RecurrentState(length, after.to(before.matrix.dtype))

    def split(self, x: Tensor) -> Tensor:
        """(B, L, H * E) -> (B, H, L, E), float32 or wider."""
        return split_heads(x.to(wide_dtype(x)), self.dims.num_heads)

    def _norm_and_gate(self, out: Tensor, x: Tensor) -> Tensor:
        """(B, L, H, Ev) -> (B, L, H * Ev)."""
        gate = None if self.project_gate is None else self.project_gate(x)
        return recomputed(partial(norm_and_gate, centred=self.heads.centred), out, gate, self.norm_gain)


def norm_and_gate(x: Tensor, gate: Tensor | None, gain: Tensor | None, *, centred: bool) -> Tensor:
    """Norm of each head, times the gain, times swish of the gate.

    Args:
        x: (B, L, H, Ev), float32 or wider.
        gate: (B, L, H * Ev); None for no gate.
        gain: (Ev,); None for 1.
        centred: whether the mean is subtracted.

    Returns:
        (B, L, H * Ev), the dtype of x.
    """
    gain = None if gain is None else gain.to(x.dtype)
    normed = F.layer_norm(x, x.shape[-1:], gain, None, NORM_EPSILON) if centred else _root_mean_square_norm(x, gain)
    normed = normed.flatten(2)
    return normed if gate is None else normed * F.silu(gate.to(x.dtype))


def _root_mean_square_norm(x: Tensor, gain: Tensor | None) -> Tensor:
    scaled = x * (x.square().mean(dim=-1, keepdim=True) + NORM_EPSILON).rsqrt()
    return scaled if gain is None else scaled * gain


def check_chunk(owner: str, chunk: int) -> None:
    """Raise ValueError for a chunk without tokens."""
    if chunk < 1:
        raise ValueError(f"{owner}: chunk must be at least 1, got {chunk}")


def scaled_width(owner: str, option: str, expansion: float, dims: Dims) -> int:
    """Width of a head, head_dim times an expansion.

    Raises:
        ValueError: a width that is not a whole number above 0.
    """
    width = expansion * dims.head_dim
    if width < 1 or not width.is_integer():
        raise ValueError(
            f"{owner}: {option}={expansion} of head_dim={dims.head_dim} must give a whole width of at least 1, "
            f"got {width}"
        )
    return int(width)


def recurrent_cost(dims: Dims, heads: RecurrentHeads, length: int, dtype_bytes: int) -> Cost:
    """The price of `RecurrentMixer` without what its recurrence keeps; see `additive_cost` and `delta_cost`.

    Autograd keeps x, the result before the norm, the gate, and the normed and gated result in the dtypes of both.
    """
    keys, values = dims.num_heads * heads.width, dims.num_heads * heads.value_width
    weights = dims.embed_dim * (2 * keys + (2 + heads.gate) * values)
    biases = 2 * keys + (1 + heads.gate) * values + dims.embed_dim if dims.bias else 0
    wide_bytes = max(4, dtype_bytes)
    return Cost(
        flops=2 * length * weights,
        activation_bytes=length * (dtype_bytes * (dims.embed_dim + (1 + heads.gate) * values) + wide_bytes * values),
        state_bytes=wide_bytes * dims.num_heads * heads.width * heads.value_width,
        parameters=weights + biases + (heads.value_width if heads.gain else 0),
    )


def additive_cost(dims: Dims, heads: RecurrentHeads, length: int, dtype_bytes: int, *, decay_width: int) -> Cost:
    """The price of the additive recurrence in chunks: the pairs inside them, and writing and reading their matrices.

    Autograd keeps q, k, v, the log-decays (`decay_width` numbers for each head) and one matrix for each segment.
    """
    chunk, chunks, segments = _chunks(heads, dims, length)
    per_chunk = chunk * (chunk + 2 * heads.width) * heads.value_width + chunk * chunk * heads.width
    numbers = length * (2 * heads.width + heads.value_width + decay_width)
    numbers += segments * heads.width * heads.value_width
    return Cost(
        flops=2 * dims.num_heads * chunks * per_chunk,
        activation_bytes=max(4, dtype_bytes) * dims.num_heads * numbers,
    )


def delta_cost(dims: Dims, heads: RecurrentHeads, length: int, dtype_bytes: int, *, decay_width: int) -> Cost:
    """The price of the delta rule in chunks: the additive recurrence, the pairs of keys, their inverse, and reading k.

    Autograd keeps β besides.
    """
    chunk, chunks, _ = _chunks(heads, dims, length)
    per_chunk = chunk * chunk * (2 * heads.width + heads.value_width) + chunk * heads.width * heads.value_width
    return additive_cost(dims, heads, length, dtype_bytes, decay_width=decay_width) + Cost(
        flops=2 * dims.num_heads * chunks * per_chunk,
        activation_bytes=max(4, dtype_bytes) * dims.num_heads * length,
    )


def _chunks(heads: RecurrentHeads, dims: Dims, length: int) -> tuple[int, int, int]:
    """Tokens per chunk, chunks, and segments of one sequence."""
    if length == 0:
        return heads.chunk, 0, 0
    chunk = chunk_size(heads.chunk, length)
    chunks = -(-length // chunk)
    return chunk, chunks, -(-chunks // segment_chunks(dims.num_heads, heads.width, heads.value_width, chunk))
