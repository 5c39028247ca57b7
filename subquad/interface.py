"""The contract of every layer: what goes in, what comes out, what may be asked, what it costs.

Letters used in shapes everywhere: B batch, L query length, S key length, D model width, H heads, E head width,
W window, R rank, F features. Between layers tensors are (B, L, D), inside heads (B, H, L, E).

A mechanism is a frozen config dataclass (its options, traits and price, as arithmetic) and a module built from it.
Modules derive from `TokenMixer`, which validates calls and keeps padding out for all; a mechanism writes `mix`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from subquad.config import coerce_fields, config_fields, field_names, make_config
from subquad.costs import Cost
from subquad.mask import Mask
from subquad.receipt import leave_receipt
from subquad.registry import FEEDFORWARDS, MIXERS, Registry
from subquad.state import State


class Mixed(NamedTuple):
    """What every mixer returns.

    Attributes:
        y: (B, L, D), the dtype of x; exactly 0 at invalid positions.
        state: the new state, or None when none was given.
        aux_loss: None, or a float32 scalar, already weighted, to be added to the loss.
    """

    y: Tensor
    state: State | None = None
    aux_loss: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a mechanism can do, with these options. Each True is proved by the contract tests."""

    bidirectional: bool = False
    """Every token may see tokens after it (`causal=False`)."""
    causal: bool = False
    """`causal=True` is offered, and f(x)[:t] == f(x[:t])."""
    cross: bool = False
    """`cross=True` is offered: queries from x, keys and values from `context`."""
    padding: bool = False
    """`Mask.valid` is honoured."""
    segments: bool = False
    """`Mask.segments` is honoured: packed documents don't mix."""
    state: bool = False
    """Causal and cross forms continue from a state."""
    constant_state: bool = False
    """The state of the causal form stops growing."""
    global_tokens: bool = False
    """`Mask.global_tokens` is honoured."""
    fixed_length: bool = False
    """`max_length` is required and longer input is refused."""
    approximates_softmax: bool = False
    """Computes or approximates softmax attention over all keys."""
    aux_loss: bool = False
    """Returns an auxiliary loss in training."""


TRAIT_NAMES = tuple(field.name for field in fields(Traits))


@dataclass(frozen=True, kw_only=True)
class Dims:
    """The sizes and circumstances a mixer is built for; the same for every mechanism.

    Attributes:
        embed_dim: D, width of the stream.
        num_heads: H.
        head_dim: E; H * E need not equal D.
        causal: a token sees itself and what came before.
        cross: keys and values come from `context`.
        max_length: longest input, required by mechanisms with `fixed_length`.
        positions: "rotary" rotates queries and keys.
        bias: whether projections have biases.
        dropout: rate on the output of the mixer, never on attention probabilities.
        layer: index of the layer; with the config's seed it determines fixed random structure.
        num_global: tokens per example that the model will ask to be global; used for the price alone.
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    causal: bool = False
    cross: bool = False
    max_length: int | None = None
    positions: Literal["none", "rotary"] = "none"
    bias: bool = True
    dropout: float = 0.0
    layer: int = 0
    num_global: int = 0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: naming the argument, what was expected and what was got.
        """
        coerce_fields(self, "build_mixer")
        for name in ("embed_dim", "num_heads", "head_dim", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"build_mixer: {name} must be at least 1, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"build_mixer: dropout must be in [0, 1), got {self.dropout}")
        if self.causal and self.cross:
            raise ValueError("build_mixer: cross=True excludes causal=True; the context has no order relative to x")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"build_mixer: positions='rotary' needs an even head_dim, got {self.head_dim}")

    @property
    def inner_dim(self) -> int:
        """H * E, the width of all heads together."""
        return self.num_heads * self.head_dim


class _WrittenConfig:
    """Strict conversion between a config and its written form; shared by both slots of a layer."""

    name: ClassVar[str] = "unregistered"
    registry: ClassVar[Registry[type]]

    def __post_init__(self) -> None:
        coerce_fields(self, self.name)

    def to_dict(self) -> dict[str, Any]:
        """Written form: the name first, then every option, JSON-ready."""
        return {"name": self.name, **config_fields(self)}

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; absent options take their defaults.

        Raises:
            ValueError: no or unknown name, another mechanism's name, an unknown option, a wrong type or value.
        """
        options = dict(written)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise ValueError(f"a written {cls.registry.slot} needs its 'name', got {written!r}")
        config_class = cls.registry.lookup(name)
        if not issubclass(config_class, cls):
            raise ValueError(f"{cls.name}: the written config is of {name!r}; read it with that class or the base")
        return make_config(config_class, name, options)


@dataclass(frozen=True, kw_only=True)
class MixerConfig(_WrittenConfig, ABC):
    """Options of a token mixer; a subclass is one mechanism."""

    registry: ClassVar[Registry[type]] = MIXERS
    family: ClassVar[str] = "other"
    """sparse, factorised, recurrent, attention-free or conditional; lists group by it."""
    placement: ClassVar[Literal["sublayer", "block"]] = "sublayer"
    """A sublayer gets the normalised stream; a block owns norm, residual and channel mixing."""

    @property
    @abstractmethod
    def traits(self) -> Traits:
        """What this mechanism can do with these options."""

    @abstractmethod
    def build(self, dims: Dims) -> TokenMixer:
        """The module, with freshly initialised parameters."""

    @abstractmethod
    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """The price of one forward pass over one sequence, projections included."""

    def check(self, dims: Dims) -> None:
        """Raise ValueError where these options don't go with these dims, beyond what the traits say."""


@dataclass(frozen=True, kw_only=True)
class FeedforwardConfig(_WrittenConfig, ABC):
    """Options of a channel mixer; a subclass is one mechanism."""

    registry: ClassVar[Registry[type]] = FEEDFORWARDS

    dropout: float = 0.0
    """Rate after the activation and on the output."""

    @abstractmethod
    def build(self, embed_dim: int) -> ChannelMixer:
        """The module, with freshly initialised parameters."""

    @abstractmethod
    def cost(self, embed_dim: int, length: int, dtype_bytes: int) -> Cost:
        """The price of one forward pass over one sequence."""


def mixers_with(trait: str) -> list[str]:
    """Names of the registered mechanisms that have a trait with their default options."""
    names = []
    for name, config_class in MIXERS.items():
        required = [f for f in fields(config_class) if f.default is f.default_factory]
        if not required and getattr(config_class().traits, trait):
            names.append(name)
    return names


def refuse(name: str, trait: str, asked: str) -> ValueError:
    """The error for a mechanism asked for what it can't do; names those that can."""
    able = ", ".join(mixers_with(trait)) or "none"
    return ValueError(f"{name}: {asked} is not supported; mechanisms that support it: {able}")


class TokenMixer(nn.Module, ABC):
    """Mixes information between the tokens of a sequence; base of every mechanism."""

    def __init__(self, config: MixerConfig, dims: Dims) -> None:
        super().__init__()
        self.config = config
        self.dims = dims

    @abstractmethod
    def mix(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, context_mask: Mask | None, state: State | None
    ) -> Mixed:
        """The mechanism. Inputs are validated and their invalid tokens zeroed; y is zeroed there afterwards."""

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Mask | None = None,
        context_mask: Mask | None = None,
        state: State | None = None,
    ) -> Mixed:
        """Mix the tokens of x.

        Args:
            x: (B, L, D), floating point.
            context: (B, S, D), required by cross mixers unless the state holds it already; forbidden elsewhere.
            mask: facts about the tokens of x; with a state, about this call's tokens only.
            context_mask: facts about the tokens of the context.
            state: what `init_state` or an earlier call returned; not modified.

        Raises:
            ValueError: wrong shapes, dtypes or devices, or a constraint that this mechanism can't honour.
        """
        self._check_call(x, context, mask, context_mask, state)
        x_kept = x if mask is None else mask.zero_invalid(x)
        if context is not None and context_mask is not None:
            context = context_mask.zero_invalid(context)
        mixed = self.mix(x_kept, context, mask, context_mask, state)
        y = mixed.y if mask is None else mask.zero_invalid(mixed.y)
        return mixed._replace(y=y.to(x.dtype))

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """An empty state: a call with it gives the same y as one without.

        Args:
            batch_size: B.
            device: None for the parameters'.
            dtype: of the floating-point tensors; None for the parameters', float32 where that is narrower.

        Raises:
            ValueError: the mechanism, or this form of it, has no state.
        """
        if not self.config.traits.state:
            raise refuse(self.config.name, "state", "a state")
        if not (self.dims.causal or self.dims.cross):
            raise ValueError(f"{self.config.name}: a state needs causal=True or cross=True; this one is bidirectional")
        parameter = next(self.parameters())
        chosen = dtype if dtype is not None else torch.promote_types(parameter.dtype, torch.float32)
        return self.new_state(batch_size, torch.device(device) if device else parameter.device, chosen)

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The empty state of this mechanism; written by those that have one."""
        raise refuse(self.config.name, "state", "a state")

    def initialise(self) -> None:
        """Draw anew the parameters that are this module's own; its submodules are initialised by themselves."""

    def shared_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that a model ties to the first layer of equal config."""
        return ()

    def extra_repr(self) -> str:
        """The config, for `print(mixer)`."""
        return f"{self.config!r}, {self.dims!r}"

    def _check_call(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, context_mask: Mask | None, state: State | None
    ) -> None:
        name, dims = self.config.name, self.dims
        _check_stream(name, "x", x, dims.embed_dim)
        if dims.max_length is not None and self.config.traits.fixed_length:
            for label, tensor in (("x", x), ("context", context)):
                if tensor is not None and tensor.shape[1] > dims.max_length:
                    raise ValueError(
                        f"{name}: {label} has length {tensor.shape[1]} but was built for max_length="
                        f"{dims.max_length}; build it with a larger max_length"
                    )
        self._check_context(x, context, context_mask, state)
        if state is not None and not self.config.traits.state:
            raise refuse(name, "state", "a state")
        if state is not None and state.length.shape[0] != x.shape[0]:
            raise ValueError(f"{name}: the state holds {state.length.shape[0]} rows but x has {x.shape[0]}")
        if mask is not None:
            self._check_mask(x, mask, "mask")
        if context is not None and context_mask is not None:
            self._check_mask(context, context_mask, "context_mask")

    def _check_context(self, x: Tensor, context: Tensor | None, context_mask: Mask | None, state: State | None) -> None:
        name = self.config.name
        if not self.dims.cross:
            if context is not None or context_mask is not None:
                raise ValueError(f"{name}: got a context, but was built with cross=False; build it with cross=True")
            return
        if context is None:
            if state is None:
                raise ValueError(
                    f"{name}: was built with cross=True and needs context (B, S, D), or a state holding it"
                )
            if context_mask is not None:
                raise ValueError(f"{name}: context_mask goes with context; the state keeps the mask of its own context")
            return
        _check_stream(name, "context", context, self.dims.embed_dim)
        if context.shape[0] != x.shape[0]:
            raise ValueError(f"{name}: context has {context.shape[0]} rows but x has {x.shape[0]}")

    def _check_mask(self, tokens: Tensor, mask: Mask, label: str) -> None:
        name, traits = self.config.name, self.config.traits
        mask.check(name, tokens, name=label)
        if mask.valid is not None and not traits.padding:
            raise refuse(name, "padding", f"{label}.valid")
        if mask.segments is not None and not traits.segments:
            raise refuse(name, "segments", f"{label}.segments")
        if mask.global_tokens is not None and not traits.global_tokens:
            able = ", ".join(mixers_with("global_tokens")) or "none"
            reason = f"{name} has no global tokens (mechanisms that have: {able})"
            leave_receipt(name, asked="global_tokens", ran="ignored", reason=reason)


class ChannelMixer(nn.Module, ABC):
    """Mixes the channels of each token: the second slot of a layer."""

    @abstractmethod
    def forward(self, x: Tensor, *, mask: Mask | None = None) -> Mixed:
        """Transform each token of x (B, L, D); `state` of the result is None."""


def _check_stream(name: str, label: str, tensor: Tensor, embed_dim: int) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: {label} must be floating point, got {tensor.dtype}")
    if tensor.ndim != 3 or tensor.shape[-1] != embed_dim:
        raise ValueError(f"{name}: {label} must have shape (B, L, {embed_dim}), got {tuple(tensor.shape)}")


def option_names(config_class: type) -> list[str]:
    """Option names of a config class, as the command line and the docs list them."""
    return field_names(config_class)
