"""The base of mechanisms that are attention: projections into heads, rotary positions, and back.

    q, k, v = split(x W_q), split(x W_k), split(x W_v)        out = merge(attend(q, k, v)) W_o

A mechanism derived from `HeadMixer` writes one method, `attend`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from subquad.costs import Cost
from subquad.interface import Dims, Mixed, MixerConfig, TokenMixer
from subquad.layers.projection import Projection
from subquad.mask import Mask, token_positions
from subquad.ops.head_split import merge_heads, split_heads
from subquad.ops.rotary import rotate
from subquad.parting import Parting
from subquad.state import State

BY_HEADS = Parting(("project_query", "project_key", "project_value"), ("project_out",))
"""The parting of a `HeadMixer` whose heads are all the same function of their own q, k and v."""


class Heads(NamedTuple):
    """What a mechanism attends with.

    Attributes:
        x: (B, L, D), the stream itself, for mechanisms with further projections.
        q: (B, H, L, E).
        k: (B, H, S, E), or None when the context lies in the state.
        v: (B, H, S, E), or None likewise.
        mask: facts about the queries' tokens.
        key_mask: facts about the keys' tokens; the same object as `mask` in self-attention.
    """

    x: Tensor
    q: Tensor
    k: Tensor | None
    v: Tensor | None
    mask: Mask
    key_mask: Mask

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Of a call that brought them: any but one of cross-attention whose context lies in the state."""
        assert self.k is not None
        assert self.v is not None
        return self.k, self.v


class Attended(NamedTuple):
    """What `attend` returns where there is a loss of its own.

    Attributes:
        out: (B, H, L, E).
        state: the new state, or None when none was given.
        aux_loss: as in `Mixed`.
    """

    out: Tensor
    state: State | None = None
    aux_loss: Tensor | None = None


class HeadMixer(TokenMixer):
    """Projects into heads, calls `attend`, projects back."""

    def __init__(self, config: MixerConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.project_query = Projection(dims.embed_dim, dims.inner_dim, bias=dims.bias)
        self.project_key = Projection(dims.embed_dim, dims.inner_dim, bias=dims.bias)
        self.project_value = Projection(dims.embed_dim, dims.inner_dim, bias=dims.bias)
        self.project_out = Projection(dims.inner_dim, dims.embed_dim, bias=dims.bias)
        self.dropout = nn.Dropout(dims.dropout)
        for projection in (self.project_query, self.project_key, self.project_value, self.project_out):
            initialise_projection(projection)

    @abstractmethod
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None] | Attended:
        """The mechanism on heads: the result (B, H, L, E), and the new state when one was given."""

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Queries of x, keys and values of the context (of x in self-attention), split into heads."""
        q = self.split(self.project_query(x))
        source = context if self.dims.cross else x
        if source is None:
            return q, None, None
        return q, self.split(self.project_key(source)), self.split(self.project_value(source))

    def mix(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, context_mask: Mask | None, state: State | None
    ) -> Mixed:
        """Project, rotate, attend, project back."""
        q, k, v = self.project(x, context)
        key_mask = context_mask if self.dims.cross else mask
        if self.dims.positions == "rotary":
            q, k = self.rotate_heads(q, k, mask, key_mask, state)
        heads = Heads(x, q, k, v, mask or Mask(), key_mask or Mask())
        out, after, *aux_loss = self.attend(heads, state)  # the third, where there is one
        y = self.project_out(merge_heads(out.to(x.dtype)))
        return Mixed(self.dropout(y), after, *aux_loss)

    def split(self, x: Tensor) -> Tensor:
        """(B, L, H * E) -> (B, H, L, E)."""
        return split_heads(x, self.dims.num_heads)

    def rotate_heads(
        self, q: Tensor, k: Tensor | None, mask: Mask | None, key_mask: Mask | None, state: State | None
    ) -> tuple[Tensor, Tensor | None]:
        """Queries and keys by their positions, before `attend`; a mechanism that rotates at another point overrides it.

        Raises:
            ValueError: segments in a stream of cross-attention.
        """
        if self.dims.cross and state is not None and mask is not None and mask.segments is not None:
            raise ValueError(
                f"{self.config.name}: rotary positions inside the segments of a cross-attention stream are not known "
                "across calls; pass all of x in one call without a state, or positions='none'"
            )
        start = None if state is None else state.length
        positions = token_positions(mask, q.shape[0], q.shape[2], device=q.device, start=start)
        q = rotate(q, positions)
        if k is not None and self.dims.cross:
            positions = token_positions(key_mask, k.shape[0], k.shape[2], device=k.device)
        return q, None if k is None else rotate(k, positions)


def initialise_projection(projection: nn.Linear) -> None:
    """Xavier-uniform weights and zero biases, as in the original Transformer and Long Range Arena."""
    nn.init.xavier_uniform_(projection.weight)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)


def projection_cost(dims: Dims, length: int, dtype_bytes: int, *, kept: str = "qkv") -> Cost:
    """The price of the four projections of `HeadMixer`.

    Autograd keeps the input x, the merged heads, and those of q, k and v that are `kept` in the dtype of x; a context
    is kept too, but once for all that read it, so that their model prices it.
    """
    keys = dims.key_length(length)
    heads = length + sum(length if name == "q" else keys for name in kept)
    weights = dims.embed_dim * dims.inner_dim
    biases = 3 * dims.inner_dim + dims.embed_dim if dims.bias else 0
    return Cost(
        flops=2 * 2 * (length + keys) * weights,
        activation_bytes=dtype_bytes * (length * dims.embed_dim + heads * dims.inner_dim),
        parameters=4 * weights + biases,
    )


def attention_cost(dims: Dims, length: int, pairs: int, dtype_bytes: int) -> Cost:
    """The price of softmax attention on projected heads: `pairs` visible pairs of one head, on average over the heads.

    Beyond q, k, v and the result, which `projection_cost` prices, autograd keeps the log-sum-exp of every row.
    """
    return Cost(
        flops=2 * 2 * pairs * dims.inner_dim,
        activation_bytes=max(4, dtype_bytes) * dims.num_heads * length,
    )
