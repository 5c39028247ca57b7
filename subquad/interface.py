"""The contract of every layer: what goes in, what comes out, what may be asked, what it costs.

Letters used in shapes everywhere: B batch, L query length, S key length, D model width, H heads, E head width,
W window, R rank, F features. Between layers tensors are (B, L, D), inside heads (B, H, L, E).

A mechanism is a frozen config dataclass (its options, traits and price, as arithmetic) and a module built from it.
Modules derive from `TokenMixer`, which validates calls and keeps padding out for all; a mechanism writes `mix`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from subquad.calls import Call, check_call, check_dtypes, check_state
from subquad.capability import TRAIT_NAMES as TRAIT_NAMES
from subquad.capability import Dims as Dims
from subquad.capability import Traits as Traits
from subquad.capability import mixers_with as mixers_with
from subquad.capability import refuse as refuse
from subquad.config import coerce_fields, config_fields, make_config
from subquad.costs import Cost
from subquad.mask import Mask
from subquad.parting import Parting
from subquad.registry import FEEDFORWARDS, MIXERS, Registry
from subquad.state import State, state_dtype


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


class _WrittenConfig:
    """Strict conversion between a config and its written form; shared by both slots of a layer."""

    name: ClassVar[str] = "unregistered"
    registry: ClassVar[Registry[type]]

    def __post_init__(self) -> None:
        coerce_fields(self, self.name)

    def check_least(self, least: Mapping[str, float]) -> None:
        """Check that options are not too small.

        Args:
            least: option to the smallest value that it may have; None, where it may be that, counts as large enough.

        Raises:
            ValueError: one is smaller.
        """
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{self.name}: {name} must be at least {smallest}, got {value}")

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
    """dense, sparse, factorised, recurrent, attention-free or conditional; lists group by it."""
    placement: ClassVar[Literal["sublayer", "block"]] = "sublayer"
    """A sublayer gets the normalised stream; a block owns norm, residual and channel mixing."""
    why_not_causal: ClassVar[str] = ""
    """Where options decide whether there is a causal form: why there is none, and which options give one."""
    why_not_rotary: ClassVar[str] = ""
    """Why queries and keys can't be rotated, behind "positions='rotary' is not supported,"; "" where they can."""

    @property
    def padded_structure(self) -> str:
        """What is laid over the padded length (blocks, landmarks), so that right padding changes y; "" for nothing."""
        return ""

    @property
    def prepended_tokens(self) -> int:
        """Tokens of a global stream, the first of x: learned vectors that the model puts before its input."""
        return 0

    @property
    @abstractmethod
    def traits(self) -> Traits:
        """What this mechanism can do with these options."""

    @abstractmethod
    def build(self, dims: Dims) -> TokenMixer:
        """The module, with freshly initialised parameters."""

    @abstractmethod
    def cost(self, dims: Dims, length: int, dtype_bytes: int) -> Cost:
        """The price of one forward pass over one sequence, projections included.

        A cross mixer reads `dims.key_length(length)` tokens, which are kept but priced with the model.
        """

    def check(self, dims: Dims) -> None:
        """Raise ValueError where these options don't go with these dims, beyond what the traits say."""

    def comparison(self, dims: Dims, length: int) -> Comparison:
        """How to measure what attending to fewer pairs, or in another way, costs in accuracy, at a length."""
        del dims, length
        return Comparison(self)


class Comparison(NamedTuple):
    """What is held against what when the error of a mechanism against exact attention is measured.

    Attributes:
        measured: the mechanism, without what it adds to attention.
        exact: attention to everything visible of the mechanism's own kind, where its queries are its keys too; None for
            dense attention.
        note: what a reader of the error has to know, one sentence, or nothing.
    """

    measured: MixerConfig
    exact: MixerConfig | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class FeedforwardConfig(_WrittenConfig, ABC):
    """Options of a channel mixer; a subclass is one mechanism."""

    registry: ClassVar[Registry[type]] = FEEDFORWARDS

    dropout: float = 0.0
    """Rate after the activation and on the output."""

    @property
    def position_wise(self) -> bool:
        """Whether y of a token depends on that token alone and nothing is added to the loss, so that L can be cut."""
        return False

    @abstractmethod
    def build(self, embed_dim: int) -> ChannelMixer:
        """The module, with freshly initialised parameters."""

    @abstractmethod
    def cost(self, embed_dim: int, length: int, dtype_bytes: int) -> Cost:
        """The price of one forward pass over one sequence."""


class TokenMixer(nn.Module, ABC):
    """Mixes information between the tokens of a sequence; base of every mechanism."""

    parting: ClassVar[Parting | None] = None
    """The layers by which processes can share the heads; None where the mixer is no sum over its heads."""

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
        name = self.config.name
        call = Call(x, context, mask, context_mask, state)
        check_call(self.config, self.dims, call)
        check_dtypes(name, next(self.parameters(), x).dtype, call)
        if state is not None:
            check_state(name, x, state, self.init_state(0))
        if mask is not None and not self.config.traits.global_tokens:
            mask = replace(mask, global_tokens=None)  # declined with a receipt, so that no operation honours it
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
            raise refuse(self.config, "state", "a state")
        if not (self.dims.causal or self.dims.cross):
            raise ValueError(f"{self.config.name}: a state needs causal=True or cross=True; this one is bidirectional")
        parameter = next(self.parameters(), torch.empty(0))  # a mixer without parameters: torch's defaults
        place = parameter.device if device is None else torch.device(device)
        return self.new_state(batch_size, place, state_dtype(parameter.dtype, dtype))

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The empty state of this mechanism; written by those that have one."""
        raise NotImplementedError(f"{self.config.name}: has the trait state, but its module doesn't write new_state")

    def initialise(self) -> None:
        """Draw anew the parameters that are this module's own; its submodules are initialised by themselves."""

    def shared_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that a model ties to the first layer of equal config."""
        return ()

    def extra_repr(self) -> str:
        """The config, for `print(mixer)`."""
        return f"{self.config!r}, {self.dims!r}"


class ChannelMixer(nn.Module, ABC):
    """Mixes the channels of each token: the second slot of a layer."""

    parting: ClassVar[Parting | None] = None
    """The layers by which processes can share the hidden channels; None where the mixer is no sum over them."""

    @abstractmethod
    def forward(self, x: Tensor, *, mask: Mask | None = None) -> Mixed:
        """Transform each token of x (B, L, D); `state` of the result is None."""

    def initialise(self) -> None:
        """Draw anew the parameters that are this module's own; its submodules are initialised by themselves."""
