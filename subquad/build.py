"""Names to modules: the functions a user calls. Importing this module fills the registry."""

from __future__ import annotations

from typing import Any, Literal

import subquad.feedforward
import subquad.mechanisms  # noqa: F401 - both are imported for their effect: they fill the registry
from subquad.config import check_count, make_config, nearest
from subquad.costs import Cost
from subquad.interface import (
    TRAIT_NAMES,
    ChannelMixer,
    Dims,
    FeedforwardConfig,
    MixerConfig,
    TokenMixer,
    Traits,
    mixers_with,
    refuse,
)
from subquad.registry import FEEDFORWARDS, MIXERS


def mixer_config(name: str, **options: Any) -> MixerConfig:
    """The config of a mechanism.

    Raises:
        ValueError: unknown name or option, or a bad value.
    """
    return make_config(MIXERS.lookup(name), name, options)


def feedforward_config(name: str, **options: Any) -> FeedforwardConfig:
    """The config of a channel mixer.

    Raises:
        ValueError: unknown name or option, or a bad value.
    """
    return make_config(FEEDFORWARDS.lookup(name), name, options)


def build_mixer(
    name: str,
    *,
    embed_dim: int,
    num_heads: int,
    head_dim: int | None = None,
    causal: bool = False,
    cross: bool = False,
    max_length: int | None = None,
    positions: Literal["none", "rotary"] = "none",
    bias: bool = True,
    dropout: float = 0.0,
    layer: int = 0,
    **options: Any,
) -> TokenMixer:
    """Build a token mixer by name.

    Args:
        name: one of `list_mixers()`.
        embed_dim: D, width of input and output.
        num_heads: H.
        head_dim: E, width of a head; None for embed_dim / num_heads.
        causal: each token sees itself and the past only.
        cross: keys and values come from a second sequence, `context`.
        max_length: longest input; required where the trait `fixed_length` holds, without effect elsewhere.
        positions: "rotary" rotates queries and keys by their position.
        bias: whether the projections have biases.
        dropout: rate on the output; attention probabilities are never dropped.
        layer: index of the layer, seeds fixed random structure.
        **options: the fields of the mechanism's config.

    Returns:
        A module called as `y, state, aux_loss = mixer(x, context=None, mask=None, context_mask=None, state=None)`.

    Raises:
        ValueError: unknown name or option, a bad value, or something that this mechanism can't do.
    """
    dims = make_dims(
        embed_dim=embed_dim,
        num_heads=num_heads,
        head_dim=head_dim,
        causal=causal,
        cross=cross,
        max_length=max_length,
        positions=positions,
        bias=bias,
        dropout=dropout,
        layer=layer,
    )
    return build_from_config(mixer_config(name, **options), dims)


def build_from_config(config: MixerConfig, dims: Dims) -> TokenMixer:
    """Build a mixer from its config and dims, refusing what the mechanism can't do.

    Raises:
        ValueError: something that this mechanism, with these options, can't do.
    """
    check_dims(config, dims)
    return config.build(dims)


def check_dims(config: MixerConfig, dims: Dims) -> None:
    """Refuse what a mechanism can't do, before any tensor exists.

    Raises:
        ValueError: what was asked, and which mechanisms can.
    """
    traits = config.traits
    if dims.causal and not traits.causal:
        raise refuse(config, "causal", "causal=True", config.why_not_causal)
    if not dims.causal and not dims.cross and not traits.bidirectional:
        raise refuse(config, "bidirectional", "causal=False")
    if dims.cross and not traits.cross:
        raise refuse(config, "cross", "cross=True")
    if traits.fixed_length and dims.max_length is None:
        raise ValueError(f"{config.name}: its parameters depend on the length; pass max_length (longest input)")
    if dims.positions == "rotary" and config.why_not_rotary:
        raise ValueError(
            f"{config.name}: positions='rotary' is not supported, {config.why_not_rotary}; use positions='none'"
        )
    config.check(dims)


def make_dims(
    *,
    embed_dim: int,
    num_heads: int,
    head_dim: int | None = None,
    causal: bool = False,
    cross: bool = False,
    max_length: int | None = None,
    positions: Literal["none", "rotary"] = "none",
    bias: bool = True,
    dropout: float = 0.0,
    layer: int = 0,
    num_global: int = 0,
    context_length: int | None = None,
    owner: str = "build_mixer",
) -> Dims:
    """Dims with the default head width; the arguments are the attributes of `Dims`.

    Raises:
        ValueError: embed_dim is no multiple of num_heads and head_dim is not given, or a value out of range.
    """
    check_count(owner, "embed_dim", embed_dim)
    check_count(owner, "num_heads", num_heads)
    if head_dim is None:
        if embed_dim % num_heads:
            raise ValueError(
                f"{owner}: embed_dim={embed_dim} is not divisible by num_heads={num_heads}; "
                "choose another number of heads or pass head_dim"
            )
        head_dim = embed_dim // num_heads
    return Dims(
        embed_dim=embed_dim,
        num_heads=num_heads,
        head_dim=head_dim,
        causal=causal,
        cross=cross,
        max_length=max_length,
        positions=positions,
        bias=bias,
        dropout=dropout,
        layer=layer,
        num_global=num_global,
        context_length=context_length,
        owner=owner,
    )


def list_mixers(**traits: bool) -> list[str]:
    """Names of the token mixers; `list_mixers(causal=True, state=True)` keeps those with these traits by default.

    Raises:
        ValueError: unknown trait.
    """
    for trait in traits:
        if trait not in TRAIT_NAMES:
            raise ValueError(f"list_mixers: unknown trait {trait!r}; {nearest(trait, TRAIT_NAMES)}")
    names = [name for name, _ in MIXERS.items()]
    for trait, wanted in traits.items():
        having = mixers_with(trait)
        names = [name for name in names if (name in having) == wanted]
    return names


def list_feedforwards() -> list[str]:
    """Names of the channel mixers."""
    return [name for name, _ in FEEDFORWARDS.items()]


def traits(name: str, **options: Any) -> Traits:
    """What a mechanism can do with these options.

    Raises:
        ValueError: unknown name or option, or a bad value.
    """
    return mixer_config(name, **options).traits


def cost(
    name: str,
    *,
    length: int,
    embed_dim: int,
    num_heads: int,
    head_dim: int | None = None,
    causal: bool = False,
    cross: bool = False,
    max_length: int | None = None,
    context_length: int | None = None,
    dtype_bytes: int = 4,
    **options: Any,
) -> Cost:
    """The price of one forward pass of a mixer over one sequence of `length` tokens; nothing is allocated.

    Args:
        name: as in `build_mixer`, like the arguments that aren't named here.
        length: L, tokens of x.
        embed_dim: D.
        num_heads: H.
        head_dim: E.
        causal: the price of the causal form.
        cross: that of the form that reads a context.
        max_length: longest input.
        context_length: with cross=True, S, tokens of the context; None for as many as x has.
        dtype_bytes: of an element of x.
        **options: the fields of the mechanism's config.

    Raises:
        ValueError: as `build_mixer`, a length below 1, or a context_length without cross=True.
    """
    check_count("cost", "length", length)
    check_count("cost", "dtype_bytes", dtype_bytes)
    config = mixer_config(name, **options)
    dims = make_dims(
        embed_dim=embed_dim,
        num_heads=num_heads,
        head_dim=head_dim,
        causal=causal,
        cross=cross,
        max_length=max_length,
        context_length=context_length,
        owner="cost",
    )
    check_dims(config, dims)
    longest = max(length, dims.key_length(length))
    if config.traits.fixed_length and max_length is not None and longest > max_length:
        raise ValueError(f"{name}: length {longest} exceeds max_length={max_length}")
    return config.cost(dims, length, dtype_bytes)


def build_feedforward(name: str, *, embed_dim: int, **options: Any) -> ChannelMixer:
    """Build a channel mixer by name; called as `y, state, aux_loss = feedforward(x)` with state None.

    Raises:
        ValueError: unknown name or option, or a bad value.
    """
    check_count("build_feedforward", "embed_dim", embed_dim)
    return feedforward_config(name, **options).build(embed_dim)
