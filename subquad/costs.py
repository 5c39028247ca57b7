"""The price of a layer, as arithmetic: no tensor is allocated and torch is not imported.

Conventions, the same for every mechanism: one multiply-add is 2 FLOPs; forward pass only; one sequence (batch 1);
bytes, not megabytes. Softmax attention pays for its *visible* pairs of query and key, so causal dense attention over
L tokens counts L(L+1)/2 of them. Elementwise work, normalisation, softmax and sorting are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one layer asks of the machine for one sequence."""

    flops: int = 0
    """Floating-point operations of the forward pass, two for each multiply-add."""

    activation_bytes: int = 0
    """Bytes that autograd keeps for the backward pass, parameters not included."""

    state_bytes: int = 0
    """Bytes carried from token to token in generation; 0 where a mechanism has no state."""

    parameters: int = 0
    """Number of learned scalars."""

    def __add__(self, other: Cost) -> Cost:
        """Cost of doing both."""
        return Cost(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(Cost)})

    def __mul__(self, times: int) -> Cost:
        """Cost of `times` such layers."""
        return Cost(**{field.name: getattr(self, field.name) * times for field in fields(Cost)})

    __rmul__ = __mul__


def visible_pairs(length: int, *, left: int | None = None, right: int | None = None) -> int:
    """Number of pairs (i, j), 0 <= i, j < length, with -right <= i - j <= left; None means no bound on that side."""

    def side(bound: int | None) -> int:
        reach = length - 1 if bound is None else min(bound, length - 1)
        return reach * length - reach * (reach + 1) // 2  # sum over the offset d = 1..reach of (length - d)

    return length + side(left) + side(right) if length else 0


def window_sides(owner: str, window: int, *, causal: bool) -> tuple[int, int]:
    """Keys to the left and to the right of a token that sees `window` keys, itself included.

    Raises:
        ValueError: a two-sided window of even size; names the two odd neighbours.
    """
    if causal:
        return window - 1, 0
    if window % 2 == 0:
        raise ValueError(
            f"{owner}: a two-sided window holds the token and equally many keys on both sides, so it must be odd; "
            f"got {window}, use {window - 1} or {window + 1}"
        )
    return (window - 1) // 2, (window - 1) // 2


def overtaking_length(first: Callable[[int], int], second: Callable[[int], int], *, limit: int = 2**30) -> int | None:
    """The shortest length at which `first` costs at least as much as `second`.

    Both map a length to FLOPs and the difference is assumed to change sign at most once, as it does when one of them
    grows faster. Returns None when `first` stays cheaper up to `limit`.
    """
    high = 1
    while first(high) < second(high):
        high *= 2
        if high > limit:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if first(middle) < second(middle) else (low, middle)
    return high
