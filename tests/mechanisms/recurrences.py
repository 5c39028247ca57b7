"""Holding a mechanism with decay against its recurrence, restated token by token, one example after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from comparison import assert_same_values_and_gradients, is_valid, streamed
from torch import Tensor

from subquad import Mask
from subquad.benchmark.probes import run_probes
from subquad.build import build_mixer, make_dims, mixer_config
from subquad.layers.recurrent import RecurrentMixer

Mixer = TypeVar("Mixer", bound=RecurrentMixer)
Recur = Callable[[Mixer, Tensor], Tensor]
"""The result before norm and gate, (N, H, Ev), for the tokens (N, D) of one example without padding."""


def recurrent(kind: type[Mixer], name: str, **options: Any) -> Mixer:
    """The mechanism in float64, its parameters disturbed so that no bias is 0."""
    mixer = build_mixer(name, embed_dim=6, num_heads=2, head_dim=4, causal=True, **options).double()
    assert isinstance(mixer, kind)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return mixer


def in_heads(mixer: RecurrentMixer, x: Tensor) -> Tensor:
    """(N, H * E) -> (N, H, E)."""
    return x.unflatten(-1, (mixer.dims.num_heads, -1))


def norm_gate_and_project(mixer: RecurrentMixer, out: Tensor, x: Tensor) -> Tensor:
    """(N, H, Ev) -> (N, D)."""
    if mixer.heads.centred:
        out = out - out.mean(dim=-1, keepdim=True)
    out = out / (out.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    if mixer.norm_gain is not None:
        out = out * mixer.norm_gain
    out = out.flatten(1)
    if mixer.project_gate is not None:
        gate = mixer.project_gate(x)
        out = out * gate * torch.sigmoid(gate)
    return mixer.project_out(out)


def assert_equals_recurrence(mixer: Mixer, recur: Recur[Mixer], length: int, mask: Mask | None) -> None:
    """Values, and all gradients, under a mask whose invalid tokens are as if they weren't there."""
    x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)

    def definition() -> Tensor:
        rows = []
        for b in range(2):
            real = [i for i in range(length) if is_valid(mask, b, i)]
            row = 0 * x[b]
            if real:
                tokens = x[b, real]
                row = row.index_copy(0, torch.tensor(real), norm_gate_and_project(mixer, recur(mixer, tokens), tokens))
            rows.append(row)
        return torch.stack(rows)

    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, definition, [x])


def assert_streams_like_the_whole(mixer: RecurrentMixer, pieces: list[int], mask: Mask | None) -> None:
    """Values, and all gradients, which flow through the states from call to call."""
    x = torch.randn(2, sum(pieces), 6, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(
        mixer, lambda: streamed(mixer, x, mask, pieces), lambda: mixer(x, mask=mask).y, [x]
    )


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def convolved(x: Tensor, taps: Tensor) -> Tensor:
    """Each channel of x (N, C) summed over the last tokens with weights taps (K, C)."""
    padded = F.pad(x, (0, 0, taps.shape[0] - 1, 0))
    return torch.stack([(padded[t : t + taps.shape[0]] * taps.flip(0)).sum(dim=0) for t in range(x.shape[0])])


def assert_claims_hold(name: str, **options: Any) -> None:
    """The contract of every mixer, with options that the default doesn't show."""
    results = run_probes(mixer_config(name, **options), make_dims(embed_dim=8, num_heads=2, causal=True))
    assert not [f"{result.name}: {result.detail}" for result in results if not result.passed]
