"""The mask: which tokens are real, which document each belongs to, which see everything. True means keep.

It is a small object and not an L x L matrix, because what an efficient mechanism can honour are facts about tokens.
`valid` and `segments` are constraints: a mixer that can't honour them raises. `global_tokens` is a request: a mixer
without global tokens ignores it and leaves a receipt. Causality is not in here; it is fixed when a mixer is built.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """

    valid: Tensor | None = None
    segments: Tensor | None = None
    global_tokens: Tensor | None = None

    @classmethod
    def from_lengths(cls, lengths: Tensor | Sequence[int], length: int) -> Mask:
        """Right padding: example b has `lengths[b]` real tokens out of `length`.

        Raises:
            ValueError: a length that is negative or exceeds `length`.
        """
        counts = torch.as_tensor(lengths)
        if counts.ndim != 1 or counts.is_floating_point() or counts.dtype == torch.bool:
            raise ValueError(
                f"lengths must be one-dimensional integers, got shape {tuple(counts.shape)}, {counts.dtype}"
            )
        if counts.numel() and (int(counts.min()) < 0 or int(counts.max()) > length):
            raise ValueError(f"lengths must lie in 0..{length}, got {counts.tolist()}")
        return cls(valid=torch.arange(length, device=counts.device) < counts[:, None])

    def check(self, owner: str, x: Tensor, *, name: str = "mask") -> None:
        """Check shapes, dtypes and devices against x (B, L, D).

        Raises:
            ValueError: naming the field, what was expected and what was got.
        """
        expected = tuple(x.shape[:2])
        for field in ("valid", "segments", "global_tokens"):
            tensor = getattr(self, field)
            if tensor is None:
                continue
            where = f"{owner}: {name}.{field}"
            integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
            if field == "segments" and not integer:
                raise ValueError(f"{where} must hold integers, got {tensor.dtype}")
            if field != "segments" and tensor.dtype != torch.bool:
                raise ValueError(f"{where} must be bool (True = keep), got {tensor.dtype}; write (tensor != 0)")
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{where} must have shape (B, L) = {expected}, got {tuple(tensor.shape)}")
            if tensor.device != x.device:
                raise ValueError(f"{where} is on {tensor.device} but the input is on {x.device}; move it there")
        if self.segments is not None and bool((self.segments.diff(dim=1) < 0).any()):
            raise ValueError(f"{owner}: {name}.segments must not decrease along a sequence; number documents in order")

    def zero_invalid(self, x: Tensor) -> Tensor:
        """X (B, L, D) with invalid tokens set to exactly 0 and cut off from the gradient, whatever they hold."""
        return x if self.valid is None else x.masked_fill(~self.valid[..., None], 0.0)


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
