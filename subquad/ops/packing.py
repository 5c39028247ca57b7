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


def packing_order(valid: Tensor | None) -> Tensor | None:
    """The order of `valid_first`; None where the valid tokens stand first already, or all are (valid None)."""
    return None if valid is None or not has_gaps(valid) else valid_first(valid)


def take(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of x (B, H, L, E) or (B, L) at the places `order`, int64 (B, ...): (B, H, ..., E) or (B, ...)."""
    if x.ndim == 2:
        return x.gather(1, order.flatten(1)).view(order.shape)
    index = order.flatten(1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index).unflatten(2, order.shape[1:])


def in_order(mask: Mask, order: Tensor) -> Mask:
    """The facts of `mask` with the valid tokens first, by an order (int64 (B, L)) of `valid_first`.

    The segments of the invalid tokens behind them follow the last valid one, since segments must not decrease.
    """
    valid, segments = (None if fact is None else take(fact, order) for fact in (mask.valid, mask.segments))
    return Mask(valid, None if segments is None else segments.cummax(dim=1).values)


def put_back(x: Tensor, order: Tensor) -> Tensor:
    """Inverse of `take` for a permutation: x (B, H, L, E), order (B, L)."""
    return take(x, torch.argsort(order, dim=1))


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
