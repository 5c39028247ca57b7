"""The last members of every cluster of a stream, and causal attention to them; `causal_window` without a beginning.

Stored and new tokens are sorted by cluster, in each by age; what a query sees are the w places that end with its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LARGEST_SLICE = 2**20
"""Numbers of keys that are looked up together, over all examples and heads."""


class Rings(NamedTuple):
    """The last N members of each of C clusters, the newest in the last column.

    Attributes:
        members: int64 (B, H, C), how many columns hold one.
        keys: (B, H, C, N, E); the other columns are zeros.
        values: (B, H, C, N, E).
    """

    members: Tensor
    keys: Tensor
    values: Tensor


class RingOrder:
    """Stored and new tokens, sorted by cluster and age.

    Args:
        rings: what came before.
        k: (B, H, L, E), of the new tokens.
        v: (B, H, L, E).
        labels: int64 (B, H, L), the cluster of each.
        valid: bool (B, L), the valid tokens first.
    """

    def __init__(self, rings: Rings, k: Tensor, v: Tensor, labels: Tensor, valid: Tensor | None) -> None:
        clusters, self.stored = rings.keys.shape[2:4]
        cluster, self.column = torch.arange(clusters, device=k.device), torch.arange(self.stored, device=k.device)
        there = self.column >= self.stored - rings.members[..., None]
        of_rings = cluster[:, None].expand_as(there).masked_fill(~there, clusters).flatten(2)  # nothing goes to the end
        own = labels if valid is None else labels.masked_fill(~valid[:, None], clusters)
        ordered, self.order = torch.cat((of_rings, own), dim=2).sort(dim=2, stable=True)
        edges = cluster.expand(*ordered.shape[:2], clusters).contiguous()
        self.start, self.end = (torch.searchsorted(ordered, edges, right=right) for right in (False, True))
        self.keys = torch.cat((rings.keys.flatten(2, 3), k), dim=2)
        self.values = torch.cat((rings.values.flatten(2, 3), v), dim=2)
        self.labels = labels

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """Queries (B, H, L, E) to the last N + 1 members of their clusters, themselves included.

        Returns:
            (B, H, L, E); anything at invalid tokens.
        """
        places = self.order.argsort(dim=2)[:, :, self.order.shape[2] - q.shape[2] :]
        window = places[..., None] - self.stored + torch.arange(self.stored + 1, device=q.device)
        seen = window >= self.start.gather(2, self.labels)[..., None]
        height = max(1, LARGEST_SLICE // max(1, q[:, :, 0].numel() * (self.stored + 1)))
        found = []
        for part, columns, visible in zip(*(x.split(height, dim=2) for x in (q, window, seen)), strict=True):
            args = (part, self.keys, self.values, self._tokens(columns), visible, scale)
            found.append(checkpoint(_attend, *args, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(found, dim=2)  # pyright: ignore[reportArgumentType] - checkpoint has no types

    def newest(self) -> Rings:
        """The rings with the new members."""
        places = self.end[..., None] - self.stored + self.column
        kept = places >= self.start[..., None]
        columns = self._tokens(places)
        keys, values = (_pick(x, columns).masked_fill(~kept[..., None], 0.0) for x in (self.keys, self.values))
        return Rings(kept.sum(dim=3), keys, values)

    def _tokens(self, places: Tensor) -> Tensor:
        """The columns of the tokens at places (B, H, N, M) of the order; of those before it, any."""
        return self.order.gather(2, places.clamp_min(0).flatten(2)).view(places.shape)


def _attend(q: Tensor, keys: Tensor, values: Tensor, columns: Tensor, visible: Tensor, scale: float) -> Tensor:
    scores = (_pick(keys, columns) @ q[..., None])[..., 0] * scale
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return (weights[..., None, :] @ _pick(values, columns))[..., 0, :]


def _pick(x: Tensor, columns: Tensor) -> Tensor:
    """The columns (B, H, N, M) of x (B, H, T, E): (B, H, N, M, E)."""
    index = columns.flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])
    return x.gather(2, index).unflatten(2, columns.shape[2:])
