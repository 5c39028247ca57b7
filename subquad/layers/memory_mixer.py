"""The base of mechanisms that attend to a segment and to a memory of the inputs before it, with relative positions.

Memory holds inputs; keys and values are computed of it again. No gradient passes through it to its tokens, while the
projections learn from it. Positions are encodings of distances, projected, and two biases of the scores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from subquad.interface import Dims, MixerConfig
from subquad.layers.heads import HeadMixer, Heads
from subquad.ops.head_split import merge_heads
from subquad.ops.memory.attention import Memory, project_memory
from subquad.ops.memory.sinusoids import distance_sinusoids
from subquad.ops.packing import Packing, take
from subquad.ops.projection import project

DEVIATION = 0.02
"""Of new u, w and W_r, as in the official code."""


class Packed(NamedTuple):
    """A call whose valid tokens stand first, so that padding takes no position.

    Attributes:
        x: (B, L, D).
        q: (B, H, L, E).
        k: (B, H, L, E).
        v: (B, H, L, E).
        packing: their way there and back.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    packing: Packing


class MemoryMixer(HeadMixer):
    """Distances and their biases, and the keys and values of memory."""

    def __init__(self, config: MixerConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.project_distance = nn.Parameter(torch.empty(dims.inner_dim, dims.embed_dim))
        self.content_bias = nn.Parameter(torch.empty(dims.num_heads, dims.head_dim))
        self.position_bias = nn.Parameter(torch.empty(dims.num_heads, dims.head_dim))

    def initialise(self) -> None:
        """Draw u, w and W_r."""
        for parameter in (self.content_bias, self.position_bias, self.project_distance):
            nn.init.normal_(parameter, std=DEVIATION)

    def pack(self, heads: Heads) -> Packed:
        """The call with its padding taken out."""
        packing = Packing(heads.mask.valid)
        x, q, k, v = (packing.pack(x) for x in (heads.x, heads.q, *heads.keys_and_values()))
        return Packed(x, q, k, v, packing)

    def join(self, hidden: Tensor, call: Packed, *, apart: bool) -> tuple[Tensor, Tensor, Memory | None]:
        """Keys and values of what is stored and of the call.

        Args:
            hidden: stored inputs (B, T, D).
            call: the tokens behind them.
            apart: whether tokens of the call may be memory to others, so that keys and values are needed once more
                for the gradient of memory.
        """
        joined, past = [], []
        for layer, new in ((self.project_key, call.k), (self.project_value, call.v)):
            parts = [(call.x, new)]
            if hidden.shape[1]:
                parts.insert(0, (hidden, self.split(layer(hidden))))
            joined.append(torch.cat([heads for _, heads in parts], dim=2) if len(parts) > 1 else new)
            if apart and torch.is_grad_enabled():
                again = [
                    self.split(project_memory(merge_heads(heads), x, layer.weight, layer.bias)) for x, heads in parts
                ]
                past.append(torch.cat(again, dim=2))
        return joined[0], joined[1], Memory(*past) if past else None

    def encode(self, count: int, projection: Tensor, like: Tensor) -> Tensor:
        """The encodings of the distances 0, ..., count - 1, projected by (H * E, D) into heads: (H, count, E)."""
        encodings = distance_sinusoids(count, self.dims.embed_dim, device=like.device, dtype=like.dtype)
        return project(encodings, projection).unflatten(-1, (self.dims.num_heads, -1)).transpose(0, 1)


def recent_inputs(old: Tensor, x: Tensor, added: Tensor, unfinished: Tensor | None) -> Tensor:
    """The last T inputs of a stream, cut off from their graph but for those of a segment that goes on.

    Args:
        old: the last T before the call, (B, T, D).
        x: the call's tokens (B, L, D), the valid ones first.
        added: int64 (B,), how many are valid.
        unfinished: int64 (B,), tokens of a segment that goes on; None where none does, since every call is a segment.
    """
    stored = old.shape[1]
    if unfinished is None or bool((unfinished <= added).all()):
        old = old.detach()  # so that no graph grows from segment to segment
    hidden = recent_rows(torch.cat((old, x.to(old.dtype)), dim=1)[:, None], stored, added)[:, 0]
    if unfinished is None:
        return hidden.detach()
    age = torch.arange(stored - 1, -1, -1, device=x.device)  # 0 for the newest column
    return torch.where(age[:, None] < unfinished[:, None, None], hidden, hidden.detach())


def recent_rows(joined: Tensor, stored: int, added: Tensor) -> Tensor:
    """The last T rows of a stream.

    Args:
        joined: the last T before the call and those of the call, the valid ones first, (B, H, T + L, E).
        stored: T.
        added: int64 (B,), how many are valid.
    """
    return take(joined, added[:, None] + torch.arange(stored, device=joined.device))
