"""From Hugging Face's masks to a `Mask` over the stream, with whatever stands before the input."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.mask import Mask

_MEANING = {
    "attention_mask": "tokens to keep",
    "encoder_attention_mask": "tokens to keep",
    "global_attention_mask": "global tokens",
}


class TokenFacts(NamedTuple):
    """Facts about the tokens of one call, as Hugging Face writes them: attention, segments, global tokens.

    Attributes:
        attention: (B, L), 1 or True for real tokens; with a cache also (B, past + L), for all tokens so far.
        segments: int (B, L).
        global_tokens: (B, L), 1 or True for global tokens.
    """

    attention: Tensor | None = None
    segments: Tensor | None = None
    global_tokens: Tensor | None = None

    def newest(self, batch_size: int, length: int, past: int) -> TokenFacts:
        """The same about this call's tokens alone, (B, L) each.

        Raises:
            ValueError: a wrong shape.
        """
        named = (
            ("attention_mask", self.attention),
            ("segment_ids", self.segments),
            ("global_attention_mask", self.global_tokens),
        )
        return TokenFacts(*(_newest(name, facts, (batch_size, length), past) for name, facts in named))

    def mask(self, x: Tensor, prepended: int, *, first_is_global: Tensor | None) -> Mask | None:
        """The mask over x (B, prepended + L, D).

        Args:
            x: the stream, with the prepended vector.
            prepended: vectors that stand before the tokens.
            first_is_global: bool (B,), in which rows the first valid token is global; None for none.

        Raises:
            ValueError: facts other than bool or 0 and 1.
        """
        valid = _as_bool("attention_mask", self.attention)
        valid = None if valid is None else behind(valid, prepended, fill=True)
        segments = None if self.segments is None else behind(self.segments, prepended, fill=None)
        is_global = _as_bool("global_attention_mask", self.global_tokens)
        is_global = None if is_global is None else behind(is_global, prepended, fill=False)
        if first_is_global is not None:
            first = _first_valid(valid, x) & first_is_global[:, None]
            is_global = first if is_global is None else is_global | first
        if valid is None and segments is None and is_global is None:
            return None
        return Mask(valid, segments, is_global)


def behind_prepended(mask: Mask | None, count: int) -> Mask | None:
    """The mask over the same tokens behind `count` vectors of a global stream."""
    if mask is None:
        return None
    valid = None if mask.valid is None else behind(mask.valid, count, fill=True)
    segments = None if mask.segments is None else behind(mask.segments, count, fill=None)
    is_global = None if mask.global_tokens is None else behind(mask.global_tokens, count, fill=False)
    return Mask(valid, segments, is_global)


def context_mask(attention: Tensor | None, segments: Tensor | None) -> Mask | None:
    """The mask over an encoder's result from its attention mask and its segments, (B, S) each.

    Raises:
        ValueError: attention other than bool or 0 and 1.
    """
    if attention is None and segments is None:
        return None
    return Mask(_as_bool("encoder_attention_mask", attention), segments)


def behind(facts: Tensor, count: int, *, fill: bool | None) -> Tensor:
    """Facts (B, L) behind those of `count` prepended vectors: `fill`, or None to copy the first token's."""
    first = facts[:, :1] if fill is None else torch.full_like(facts[:, :1], fill)
    return torch.cat((first.expand(-1, count), facts), dim=1) if count else facts


def _as_bool(name: str, facts: Tensor | None) -> Tensor | None:
    """Facts as bool. Values are read where there are any: on no meta device, and in no graph that is being compiled."""
    if facts is None or facts.dtype == torch.bool:
        return facts
    if not (facts.is_meta or torch.compiler.is_compiling()):
        strange = (facts != 0) & (facts != 1)
        if bool(strange.any()):
            raise ValueError(
                f"SubquadModel: {name} must be bool or hold 0 and 1, with 1 for {_MEANING[name]}, got "
                f"{facts[strange][0].item()}; it marks tokens and is no bias that scores get"
            )
    return facts != 0


def _newest(name: str, facts: Tensor | None, shape: tuple[int, int], past: int) -> Tensor | None:
    if facts is None or tuple(facts.shape) == shape:
        return facts
    batch_size, length = shape
    if name == "attention_mask" and past and tuple(facts.shape) == (batch_size, past + length):
        return facts[:, past:]
    also = f", or (B, past + L) = {(batch_size, past + length)}" if name == "attention_mask" and past else ""
    raise ValueError(f"SubquadModel: {name} must have shape (B, L) = {shape}{also}, got {tuple(facts.shape)}")


def _first_valid(valid: Tensor | None, x: Tensor) -> Tensor:
    if valid is None:
        return (torch.arange(x.shape[1], device=x.device) == 0).expand(x.shape[0], -1)
    return valid & (valid.cumsum(dim=1) == 1)
