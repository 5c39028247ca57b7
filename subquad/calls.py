"""What a mixer may be called with: each input against what the module was built for and what its mechanism can do.

Everything here raises or does nothing, except that a request for global tokens that will be ignored leaves a receipt.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.capability import Dims, Mechanism, mixers_with, refuse
from subquad.config import field_names
from subquad.mask import Mask
from subquad.receipt import leave_receipt
from subquad.state import State


class Call(NamedTuple):
    """The inputs of one call of a mixer; see `TokenMixer.forward`."""

    x: Tensor
    context: Tensor | None
    mask: Mask | None
    context_mask: Mask | None
    state: State | None


def check_call(config: Mechanism, dims: Dims, call: Call) -> None:
    """Check everything but the kind of the state.

    Raises:
        ValueError: wrong shapes, dtypes or devices, or a constraint that this mechanism can't honour.
    """
    name = config.name
    _check_stream(name, "x", call.x, dims.embed_dim)
    _check_context(name, dims, call)
    if dims.max_length is not None and config.traits.fixed_length:
        for label, tensor in (("x", call.x), ("context", call.context)):
            if tensor is not None and tensor.shape[1] > dims.max_length:
                raise ValueError(
                    f"{name}: {label} has length {tensor.shape[1]} but was built for max_length="
                    f"{dims.max_length}; build it with a larger max_length"
                )
    if call.mask is not None:
        _check_mask(config, call.x, call.mask, "mask")
    if call.context is not None and call.context_mask is not None:
        _check_mask(config, call.context, call.context_mask, "context_mask")


def check_dtypes(name: str, parameters: torch.dtype, call: Call) -> None:
    """Check that x and the context have the dtype of the mixer's parameters, or one that autocast makes the same.

    Raises:
        ValueError: another dtype, with the two ways of making them agree.
    """
    for label, tensor in (("x", call.x), ("context", call.context)):
        if tensor is None or tensor.dtype == parameters or _autocast_unites(tensor, parameters):
            continue
        raise ValueError(
            f"{name}: {label} has dtype {tensor.dtype} but the mixer's parameters have {parameters}; pass "
            f"{label}.to({parameters}), or convert the mixer with mixer.to({tensor.dtype})"
        )


def check_state(name: str, x: Tensor, state: State, fresh: State) -> None:
    """Check that a state is such as `init_state` makes; where the `fresh` one has extent 0 it may have grown.

    Raises:
        ValueError: the state of another mechanism, of other sizes, of another batch or on another device.
    """
    if type(state) is not type(fresh):
        expected = type(fresh).__name__
        raise ValueError(f"{name}: the state is a {type(state).__name__}, expected a {expected} from init_state")
    if state.length.shape[0] != x.shape[0]:
        raise ValueError(f"{name}: the state holds {state.length.shape[0]} rows but x has {x.shape[0]}")
    if state.length.device != x.device:
        raise ValueError(f"{name}: the state is on {state.length.device} but x is on {x.device}; move it there")
    for field in field_names(type(state)):
        got, expected = getattr(state, field).shape[1:], getattr(fresh, field).shape[1:]
        if len(got) != len(expected) or any(e not in (0, g) for g, e in zip(got, expected, strict=True)):
            raise ValueError(
                f"{name}: state.{field} has shape {_batched(got)}, expected {_batched(expected)} as init_state makes "
                "it; this state comes from a mixer of other sizes or options"
            )


def _batched(shape: tuple[int, ...]) -> str:
    return f"({', '.join(('B', *map(str, shape)))})"


def _check_stream(name: str, label: str, tensor: Tensor, embed_dim: int) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: {label} must be floating point, got {tensor.dtype}")
    if tensor.ndim != 3 or tensor.shape[-1] != embed_dim:
        raise ValueError(f"{name}: {label} must have shape (B, L, {embed_dim}), got {tuple(tensor.shape)}")
    if tensor.shape[1] == 0:
        raise ValueError(f"{name}: {label} has no tokens, shape {tuple(tensor.shape)}; pass at least one")


def _autocast_unites(tensor: Tensor, parameters: torch.dtype) -> bool:
    """Whether autocast is on where the tensor lies; it narrows every dtype but float64."""
    kind = tensor.device.type
    available = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return available and torch.float64 not in (tensor.dtype, parameters)


def _check_context(name: str, dims: Dims, call: Call) -> None:
    if not dims.cross:
        if call.context is not None or call.context_mask is not None:
            raise ValueError(f"{name}: got a context, but was built with cross=False; build it with cross=True")
        return
    if call.context is None:
        if call.state is None:
            raise ValueError(f"{name}: was built with cross=True and needs context (B, S, D), or a state holding it")
        if call.context_mask is not None:
            raise ValueError(f"{name}: context_mask goes with context; the state keeps the mask of its own context")
        return
    _check_stream(name, "context", call.context, dims.embed_dim)
    if call.context.shape[0] != call.x.shape[0]:
        raise ValueError(f"{name}: context has {call.context.shape[0]} rows but x has {call.x.shape[0]}")


def _check_mask(config: Mechanism, tokens: Tensor, mask: Mask, label: str) -> None:
    name, traits = config.name, config.traits
    if not isinstance(mask, Mask):
        raise ValueError(f"{name}: {label} must be a subquad.Mask, got {type(mask).__name__}; see Mask(valid=...)")
    mask.check(name, tokens, name=label)
    if mask.valid is not None and not traits.padding:
        raise refuse(config, "padding", f"{label}.valid")
    if mask.segments is not None and not traits.segments:
        raise refuse(config, "segments", f"{label}.segments")
    if mask.global_tokens is not None and not traits.global_tokens:
        able = ", ".join(mixers_with("global_tokens")) or "none"
        reason = f"{name} has no global tokens (mechanisms that have: {able})"
        leave_receipt(name, asked="global_tokens", ran="ignored", reason=reason)


def check_stream_length(name: str, lengths: Tensor, max_length: int | None) -> None:
    """Refuse streams that outgrow what a mixer is built for.

    Args:
        name: of the mechanism.
        lengths: int64 (B,), tokens of the streams with those of the call.
        max_length: the most; None for any number.

    Raises:
        ValueError: one of them is longer.
    """
    longest = max([0, *lengths.tolist()])
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"{name}: the stream has come to {longest} tokens but was built for max_length={max_length}; build it with "
            "a larger max_length"
        )
