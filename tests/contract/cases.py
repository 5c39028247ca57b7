"""What the contract tests run over: every registered mechanism, with small sizes, in every form it offers."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from subquad.benchmark.probe_subject import Subject, miniature, small_subject
from subquad.benchmark.probes import offered_forms
from subquad.build import list_mixers, make_dims, mixer_config
from subquad.interface import Dims, MixerConfig

WIDE_HEADS = make_dims(embed_dim=24, num_heads=2, head_dim=8, max_length=96)
"""H * E = 16 differs from D = 24."""


def small_config(name: str) -> MixerConfig:
    """The mechanism with its default options, sizes shrunk."""
    return miniature(mixer_config(name))


def form_of(dims: Dims) -> str:
    """bidirectional, causal or cross."""
    if dims.cross:
        return "cross"
    return "causal" if dims.causal else "bidirectional"


def subjects() -> dict[str, Subject]:
    """Every mechanism in every form, with and without rotary positions where it takes them, by a readable label."""
    found = {}
    for name in list_mixers():
        config = mixer_config(name)
        for dims in offered_forms(config, make_dims(embed_dim=8, num_heads=2)):
            for positions in ("none", "rotary"):
                asked = replace(dims, positions=positions)
                if _accepts(config, asked):
                    label = "-".join((name, form_of(dims), *((positions,) if positions == "rotary" else ())))
                    found[label] = small_subject(config, asked)
    return found


def _accepts(config: MixerConfig, dims: Dims) -> bool:
    """Whether these positions go with the mechanism; "none" always does."""
    if dims.positions == "rotary" and config.why_not_rotary:
        return False
    try:
        config.check(dims)
    except ValueError:
        if dims.positions == "none":
            raise
        return False
    return True


def forms(name: str) -> list[Dims]:
    """`WIDE_HEADS` in every form of a mechanism."""
    return offered_forms(small_config(name), WIDE_HEADS)


def accepted_forms(config: MixerConfig) -> list[Dims]:
    """`WIDE_HEADS` in every form that these options go with: an even kernel, say, is causal alone."""
    found = []
    for dims in offered_forms(config, WIDE_HEADS):
        with suppress(ValueError):
            config.check(dims)
            found.append(dims)
    return found
