"""The mechanisms that choose, compress or replace: what `mechanism_attention.py` times.

Most rows are what a mixer runs between its projections, in training mode; recurrences are the operation alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from attention_rows import BATCH, HEADS, WIDTH, Attention, Method
from torch import Tensor

from subquad.build import build_mixer
from subquad.layers.heads import HeadMixer, Heads, projection_cost
from subquad.mask import Mask
from subquad.ops.recurrence.linear import recurrence

PRODUCTS = 3.0
"""Forward and backward over forward, for products of matrices: two backward for each one forward."""
SOFTMAX = 3.5
"""The same for softmax attention, whose scores are made again."""

SCORES_ALONE = 1.0
"""The same where the backward pass touches few of the pairs that the forward pass scores."""


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: as on the command line.
        mixer: the mechanism's name.
        targets: length -> how many times faster than dense attention it is to be on two cores.
        options: of the mechanism, for a length.
        causal: the causal form, against causal dense attention.
        step_per_forward: operations of forward and backward over those of forward.
    """

    name: str
    mixer: str
    targets: Mapping[int, float]
    options: Callable[[int], Mapping[str, Any]] = lambda _: {}
    causal: bool = False
    step_per_forward: float = SOFTMAX

    def baseline(self, length: int) -> str:
        """Dense attention, causal if the mechanism is."""
        return "causal dense" if self.causal else "dense"

    def build(self, length: int) -> HeadMixer:
        """The mixer, of width 512."""
        torch.manual_seed(0)
        mixer = build_mixer(
            self.mixer,
            embed_dim=HEADS * WIDTH,
            num_heads=HEADS,
            causal=self.causal,
            max_length=length,
            **self.options(length),
        )
        assert isinstance(mixer, HeadMixer)
        return mixer

    def attention(self, length: int) -> Attention:
        """What the mixer does with heads."""
        mixer = self.build(length)
        x = torch.randn(BATCH, length, HEADS * WIDTH, generator=torch.Generator().manual_seed(1))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return mixer.attend(Heads(x, q, k, v, Mask(), Mask()), None)[0]

        return attend

    def useful_flops(self, length: int) -> float:
        """Those of the price without the projections."""
        mixer = self.build(length)
        price, projections = mixer.config.cost(mixer.dims, length, 4), projection_cost(mixer.dims, length, 4)
        return self.step_per_forward * BATCH * (price.flops - projections.flops)


@dataclass(frozen=True)
class Recurrence:
    """A linear recurrence with decay, as the operation alone; against causal dense attention.

    Attributes:
        name: as on the command line.
        log_decay: its log-decays, for a length; they get gradients.
        delta: by the delta rule, with unit keys and half of the difference written.
        chunk: tokens per chunk.
    """

    name: str
    log_decay: Callable[[int], Tensor | None]
    delta: bool = False
    chunk: int = 32
    targets: Mapping[int, float] = field(default_factory=dict)

    def baseline(self, length: int) -> str:
        """Recurrences look back."""
        return "causal dense"

    def attention(self, length: int) -> Attention:
        """The recurrence, from an empty state."""
        log_decay = self.log_decay(length)
        beta = torch.full((BATCH, HEADS, length), 0.5, requires_grad=True) if self.delta else None

        def recur(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k = F.normalize(k, dim=-1) if self.delta else k
            return recurrence(q, k, v, log_decay, beta=beta, chunk=self.chunk).out

        return recur

    def useful_flops(self, length: int) -> float:
        """A matrix written and read, for the delta rule read once more, by each token."""
        touched = 3 if self.delta else 2
        return PRODUCTS * touched * 2 * BATCH * HEADS * length * WIDTH**2


def fixed_decays(length: int) -> Tensor:
    """RetNet's: 1 - 2^-5 for the first head, to 1 - 2^-12 for the last; (1, H, L, 1)."""
    decays = (1 - torch.exp2(-5.0 - torch.arange(HEADS))).log()
    return decays[:, None, None].expand(BATCH, HEADS, length, 1).clone().requires_grad_()


def gates(length: int) -> Tensor:
    """Gated linear attention's: a mild decay for every channel of every token; (1, H, L, E)."""
    drawn = torch.randn(BATCH, HEADS, length, WIDTH, generator=torch.Generator().manual_seed(1))
    return (F.logsigmoid(drawn) / 16).requires_grad_()


CASES: dict[str, Method] = {
    case.name: case
    for case in (
        Case("linear", "linear", {4096: 42, 16384: 120}, step_per_forward=PRODUCTS),
        Case("linear-causal", "linear", {4096: 10, 16384: 28}, causal=True, step_per_forward=PRODUCTS),
        Case("performer", "performer", {4096: 7.5, 16384: 26}, lambda _: {"features": 256}, step_per_forward=PRODUCTS),
        Case(
            "performer-causal",
            "performer",
            {4096: 2.2, 16384: 7},
            lambda _: {"features": 256},
            causal=True,
            step_per_forward=PRODUCTS,
        ),
        Case("linformer", "linformer", {4096: 8, 16384: 28}, lambda _: {"rank": 256, "sharing": "headwise"}),
        Case("nystromformer", "nystromformer", {4096: 8, 16384: 28}, lambda _: {"landmarks": 64}),
        Case("reformer", "reformer", {4096: 3.5, 16384: 12}, lambda _: {"chunk": 64, "rounds": 4}),
        Case("sinkhorn", "sinkhorn", {4096: 7, 16384: 28}, lambda _: {"block": 128}),
        Case("routing", "routing", {4096: 3, 16384: 12}, lambda length: {"window": 128, "clusters": length // 128}),
        Case("combiner-fixed", "combiner", {4096: 14, 16384: 38}, lambda _: {"plan": "fixed", "block": 128}),
        Case("combiner-logsparse", "combiner", {4096: 3, 16384: 10}, lambda _: {"plan": "logsparse"}, causal=True),
        Case(
            "combiner-rowmajor",
            "combiner",
            {4096: 4, 16384: 12},
            lambda _: {"plan": "rowmajor", "row_summary": "wsum", "block": 128},
            causal=True,
        ),
        Case("topk", "topk", {4096: 1.7, 16384: 2.4}, lambda _: {"top_k": 32}, step_per_forward=SCORES_ALONE),
        Recurrence("retention", fixed_decays, chunk=64),
        Recurrence("gated-linear", gates),
        Recurrence("delta", lambda _: None, delta=True),
        Recurrence("gated-delta", fixed_decays, delta=True),
    )
}

LINEAR = ("linear", "linear-causal", "performer", "performer-causal", "linformer", "nystromformer", "reformer")
LINEAR += ("retention", "gated-linear", "delta", "gated-delta")
"""Rows whose price per token is the same at every length."""


def find(name: str) -> Method:
    """The row of a name."""
    return CASES[name]
