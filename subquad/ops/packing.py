"""Taking padding out of a sequence and putting it back.

An invalid token takes no position: a mechanism that counts positions (a window, a cache) works on sequences whose valid
tokens stand in front, and its result is spread out again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.mask import Mask


def has_gaps(valid: Tensor) -> bool:
    """Whether an invalid token precedes a valid one in some row of valid (bool (B, L)); False for right padding."""
    return bool((valid[:, 1:] & ~valid[:, :-1]).any())


def token_counts(x: Tensor, valid: Tensor | None) -> list[int]:
    """Valid tokens of each example of x (B, H, L, E); valid: bool (B, L), None for all."""
    return [x.shape[2]] * x.shape[0] if valid is None else valid.sum(dim=1).tolist()


def valid_first(valid: Tensor) -> Tensor:
    """Order, int64 (B, L), that puts the valid tokens (bool (B, L)) of each row first and keeps their order."""
    return torch.argsort(~valid, dim=1, stable=True)


class Packing:
    """The way of a call's valid tokens to the front and back; tensors themselves where they stand there already.

    Attributes:
        valid: what was given, bool (B, L), with the valid tokens first; None for all.
    """

    def __init__(self, valid: Tensor | None) -> None:
        self._order = None if valid is None or not has_gaps(valid) else valid_first(valid)
        self.valid = valid if valid is None else self.pack(valid)

    def pack(self, x: Tensor) -> Tensor:
        """The tokens of x, (B, L), (B, L, D) or (B, H, L, E), the valid ones first."""
        return x if self._order is None else take(x, self._order)

    def pack_mask(self, mask: Mask) -> Mask:
        """The facts likewise.

        The segments of the invalid tokens behind them follow the last valid one, since segments must not decrease.
        """
        if self._order is None:
            return mask
        segments = None if mask.segments is None else self.pack(mask.segments).cummax(dim=1).values
        return Mask(None if mask.valid is None else self.pack(mask.valid), segments)

    def unpack(self, x: Tensor) -> Tensor:
        """Inverse of `pack`."""
        return x if self._order is None else take(x, torch.argsort(self._order, dim=1))


def take(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of x, (B, L), (B, L, D) or (B, H, L, E), at the places `order`, int64 (B, ...), for their L."""
    if x.ndim == 2:
        return x.gather(1, order.flatten(1)).view(order.shape)
    if x.ndim == 3:
        return take(x[:, None], order)[:, 0]
    index = order.flatten(1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index).unflatten(2, order.shape[1:])


def append(stored: Tensor, new: Tensor, columns: Tensor, length: int) -> Tensor:
    """Write new tokens behind stored ones, row by row, out of place.

    Args:
        stored: (B, H, T, E) or (B, T).
        new: (B, H, L, E) or (B, L), the same dtype.
        columns: int64 (B, L), where each new token goes; `length` or more drops it.
        length: number of columns of the result; at least T.
    """
    token_dim = stored.ndim - 2 if stored.ndim == 4 else 1
    shape = list(stored.shape)
    shape[token_dim] = length + 1 - stored.shape[token_dim]  # one column more collects what is dropped
    room = torch.cat((stored, stored.new_zeros(shape)), dim=token_dim)
    index = columns.clamp_max(length)
    if stored.ndim == 4:
        index = index[:, None, :, None].expand_as(new)
    return room.scatter(token_dim, index, new).narrow(token_dim, 0, length)
