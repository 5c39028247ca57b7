"""The mask: which tokens are real, which document each belongs to, which see everything. True means keep.

It is a small object and not an L x L matrix, because what an efficient mechanism can honour are facts about tokens.
`valid` and `segments` are constraints: a mixer that can't honour them raises. `global_tokens` is a request: a mixer
without global tokens ignores it and leaves a receipt. Causality is not in here; it is fixed when a mixer is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Facts about the tokens of a padded batch.

    Attributes:
        valid: bool (B, L), True for a real token; None when all are.
        segments: int (B, L), non-decreasing along L: tokens of different segments (packed documents) don't mix.
        global_tokens: bool (B, L), True for tokens that should see, and be seen by, everything.

    Raises:
        ValueError: another dtype or number of dimensions, or fields of different shapes or devices.
    """

    valid: Tensor | None = None
    segments: Tensor | None = None
    global_tokens: Tensor | None = None

    def __post_init__(self) -> None:
        first: tuple[str, Tensor] | None = None
        for field, tensor in self._given():
            _check_field(field, tensor)
            first = first or (field, tensor)
            if tensor.shape != first[1].shape or tensor.device != first[1].device:
                raise ValueError(
                    f"Mask: {field} is {tuple(tensor.shape)} on {tensor.device} but {first[0]} is "
                    f"{tuple(first[1].shape)} on {first[1].device}; all are about the same tokens"
                )

    @classmethod
    def from_lengths(cls, lengths: Tensor | Sequence[int], length: int) -> Mask:
        """Right padding: example b has `lengths[b]` real tokens out of `length`.

        Raises:
            ValueError: a length that is negative or exceeds `length`.
        """
        counts = torch.as_tensor(lengths)
        if counts.ndim != 1 or not holds_integers(counts):
            raise ValueError(
                f"lengths must be one-dimensional integers, got shape {tuple(counts.shape)}, {counts.dtype}"
            )
        if counts.numel() and (int(counts.min()) < 0 or int(counts.max()) > length):
            raise ValueError(f"lengths must lie in 0..{length}, got {counts.tolist()}")
        return cls(valid=torch.arange(length, device=counts.device) < counts[:, None])

    def check(self, owner: str, x: Tensor, *, name: str = "mask") -> None:
        """Check shapes, devices and the order of segments against x (B, L, D); the dtypes are right since `__init__`.

        Raises:
            ValueError: naming the field, what was expected and what was got.
        """
        expected = tuple(x.shape[:2])
        for field, tensor in self._given():
            where = f"{owner}: {name}.{field}"
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{where} must have shape (B, L) = {expected}, got {tuple(tensor.shape)}")
            if tensor.device != x.device:
                raise ValueError(f"{where} is on {tensor.device} but the input is on {x.device}; move it there")
        if self.segments is not None and not _never_decrease(self.segments):
            raise ValueError(f"{owner}: {name}.segments must not decrease along a sequence; number documents in order")

    def map(self, change: Callable[[Tensor], Tensor]) -> Mask:
        """The mask of other tokens or examples: each of the facts (B, L) changed in the same way."""
        return Mask(**{field: change(tensor) for field, tensor in self._given()})

    def zero_invalid(self, x: Tensor) -> Tensor:
        """X (B, L, D) with invalid tokens set to exactly 0 and cut off from the gradient, whatever they hold."""
        return x if self.valid is None else x.masked_fill(~self.valid[..., None], 0.0)

    def _given(self) -> list[tuple[str, Tensor]]:
        fields = (("valid", self.valid), ("segments", self.segments), ("global_tokens", self.global_tokens))
        return [(field, tensor) for field, tensor in fields if tensor is not None]


def _check_field(field: str, given: object) -> None:
    if not isinstance(given, Tensor):
        raise ValueError(f"Mask: {field} must be a tensor (B, L), got {type(given).__name__}; write torch.tensor(...)")
    if field == "segments" and not holds_integers(given):
        raise ValueError(f"Mask: segments must hold integers, got {given.dtype}")
    if field != "segments" and given.dtype != torch.bool:
        raise ValueError(f"Mask: {field} must be bool (True = keep), got {given.dtype}; write ({field} != 0)")
    if given.ndim != 2:
        raise ValueError(f"Mask: {field} must have shape (B, L), got {tuple(given.shape)}")


def holds_integers(tensor: Tensor) -> bool:
    """Whether a tensor's dtype is an integer one; bool isn't."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def token_positions(
    mask: Mask | None, batch_size: int, length: int, *, device: torch.device, start: Tensor | None = None
) -> Tensor:
    """Position of every token, int64 (B, L): its rank among the valid tokens of its segment, plus `start` (B,).

    An invalid token takes no position. When a stream continues (`start` is given) the rank is taken over the whole
    call instead: a segment may have begun in an earlier call, and only differences inside a segment matter.
    """
    if mask is None or mask.valid is None:
        rank = torch.arange(length, device=device).expand(batch_size, length)
    else:
        rank = (mask.valid.cumsum(dim=1) - 1).clamp_min(0)
    if start is not None:
        return rank + start[:, None]
    if mask is None or mask.segments is None or length == 0:
        return rank
    opens = torch.ones_like(mask.segments, dtype=torch.bool)
    opens[:, 1:] = mask.segments.diff(dim=1) != 0
    before = rank if mask.valid is None else mask.valid.cumsum(dim=1) - mask.valid.long()
    first = torch.where(opens, before, 0).cummax(dim=1).values
    return (rank - first).clamp_min(0)


def continue_segments(owner: str, last: Tensor, seen: Tensor, mask: Mask, length: int) -> Tensor:
    """Segments, int64 (B, L), of a stream's next tokens; without given ones the last segment (B,) goes on.

    A stream may begin with any number: `last` counts only in rows that have `seen` (int64 (B,)) a token.

    Raises:
        ValueError: segment numbers below the last one.
    """
    if mask.segments is None:
        return last[:, None].expand(-1, length)
    if bool(((mask.segments < last[:, None]) & (seen[:, None] > 0)).any()):
        raise ValueError(f"{owner}: segment numbers must not decrease along a stream; go on from {last.tolist()}")
    return mask.segments.long()


def _never_decrease(segments: Tensor) -> bool:
    """Whether integers (B, L) never decrease along L; differences of unsigned ones would never be negative."""
    return bool((segments[:, 1:] >= segments[:, :-1]).all())
