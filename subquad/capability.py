"""What a mechanism can do (`Traits`), what a module of it is built for (`Dims`), and how the rest is refused."""

from __future__ import annotations

from dataclasses import Field, InitVar, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Protocol

from subquad.config import check_count, coerce_fields
from subquad.registry import MIXERS


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
        context_length: S, tokens of the context of a cross mixer, None for as many as x has; for the price alone.
        owner: the function that was called with these, for messages; not kept.
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
    context_length: int | None = None
    owner: InitVar[str] = "build_mixer"

    def __post_init__(self, owner: str) -> None:
        """Check ranges.

        Raises:
            ValueError: naming the argument, what was expected and what was got.
        """
        coerce_fields(self, owner)
        for name in ("embed_dim", "num_heads", "head_dim", "max_length"):
            value = getattr(self, name)
            if value is not None:
                check_count(owner, name, value)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{owner}: dropout must be in [0, 1), got {self.dropout}")
        if self.causal and self.cross:
            raise ValueError(f"{owner}: cross=True excludes causal=True; the context has no order relative to x")
        if self.context_length is not None and not (self.cross and self.context_length >= 0):
            raise ValueError(
                f"{owner}: context_length is the number of tokens of a cross mixer's context, at least 0; "
                f"got {self.context_length} with cross={self.cross}"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"{owner}: positions='rotary' needs an even head_dim, got {self.head_dim}")

    @property
    def longest_input(self) -> int:
        """`max_length` of a mixer that can't be built without one."""
        assert self.max_length is not None
        return self.max_length

    @property
    def inner_dim(self) -> int:
        """H * E, the width of all heads together."""
        return self.num_heads * self.head_dim

    def of_cross_mixer(self, context_length: int | None = None) -> Dims:
        """Those of the cross mixer that stands beside a mixer of these dims in a layer of a decoder."""
        return replace(self, causal=False, cross=True, num_global=0, context_length=context_length)

    def key_length(self, length: int) -> int:
        """S, tokens that keys and values are made of, where x has `length`: those of the context of a cross mixer."""
        return length if self.context_length is None else self.context_length


def mixers_with(trait: str) -> list[str]:
    """Names of the registered mechanisms that have a trait with their default options."""
    names = []
    for name, config_class in MIXERS.items():
        required = [f for f in fields(config_class) if f.default is f.default_factory]
        if not required and getattr(config_class().traits, trait):
            names.append(name)
    return names


class Mechanism(Protocol):
    """What a refusal reads of a mechanism's config."""

    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def traits(self) -> Traits:
        """What the mechanism can do with these options."""
        ...


def refuse(config: Mechanism, trait: str, asked: str, why: str = "") -> ValueError:
    """The error for a mechanism asked for what it can't do.

    It names the mechanisms that can, or, where this one could but for an option, that option beside the others; and it
    says why where that helps.
    """
    able = mixers_with(trait)
    reason = f". {why}" if why else ""
    if config.name not in able:
        names = ", ".join(able) or "none"
        return ValueError(f"{config.name}: {asked} is not supported; mechanisms that support it: {names}{reason}")
    forbidding = _forbidding_options(config, trait)
    given = ", ".join(f"{name}={getattr(config, name)!r}" for name in forbidding)
    others = ", ".join(name for name in able if name != config.name) or "none"
    return ValueError(
        f"{config.name}: {asked} is not supported with {given}; leave out {' and '.join(forbidding)}, or choose "
        f"another mechanism that supports it: {others}{reason}"
    )


def _forbidding_options(config: Mechanism, trait: str) -> list[str]:
    """The option without which the config would have a trait that its mechanism has by default.

    Where no single one decides, all that were given.
    """
    given = [field for field in fields(config) if getattr(config, field.name) != field.default]
    for field in given:
        try:
            without = replace(config, **{field.name: field.default})
        except ValueError:  # another option needs this one
            continue
        if getattr(without.traits, trait):
            return [field.name]
    return [field.name for field in given]
