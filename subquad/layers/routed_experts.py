"""Experts for the items of a set, tokens or channels, chosen by noisy probabilities: what `sparse_mlp` is made of.

    p = softmax(W_r x + ε)    y = Σ_{i among the k largest} p_i (W₂ᵢ GELU(W₁ᵢ x + b₁ᵢ) + b₂ᵢ)

Items may be shorter than what the experts are built for: what is missing of them counts as 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.layers.expert_seats import Group, Seats
from subquad.layers.stacked_experts import StackedExperts
from subquad.ops.experts.noisy_routing import add_noise, importance_load_loss
from subquad.ops.experts.routing import router_logits

LEAST_SEATS = 1


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How items come to experts.

    Attributes:
        owner: name of the mechanism, for receipts.
        experts: X.
        top_k: k.
        noise: whether there is noise in training.
        capacity_factor: an expert takes this many times an equal share of a group's choices; None for all that come.
        priority: who takes the seats first, the items whose largest probability is largest, or the first ones.
        group: whose items share the seats and are to be balanced.
        balance_weight: λ.
    """

    owner: str
    experts: int
    top_k: int
    noise: bool
    capacity_factor: float | None
    priority: Literal["score", "order"]
    group: Group
    balance_weight: float


class Routed(NamedTuple):
    """What experts return.

    Attributes:
        y: (B, N, W).
        loss: in training, already weighted, a scalar; None for nothing.
    """

    y: Tensor
    loss: Tensor | None


class RoutedExperts(nn.Module):
    """A router and stacked experts."""

    def __init__(self, routing: Routing, width: int, hidden: int) -> None:
        super().__init__()
        self.routing, count = routing, routing.experts
        self.seats = Seats(owner=routing.owner, item="item", experts=count, group=routing.group, least=LEAST_SEATS)
        self.router = nn.Parameter(torch.empty(count, width))
        self.experts = StackedExperts(count, width, hidden, activation="gelu", dropout=0.0)
        self.initialise()

    def initialise(self) -> None:
        """Xavier-uniform weights, of every expert for itself, and zero biases."""
        nn.init.xavier_uniform_(self.router)
        for stacked in (self.experts.expand, self.experts.contract):
            for weight in stacked:
                nn.init.xavier_uniform_(weight)
        for bias in (self.experts.expand_bias, self.experts.contract_bias):
            nn.init.zeros_(bias)

    def forward(self, items: Tensor, valid: Tensor | None = None) -> Routed:
        """Every item through its experts.

        Args:
            items: (B, N, W), W at most the width that the experts are built for.
            valid: bool (B, N); the other items go nowhere and come back as 0.
        """
        routing, grouped = self.routing, None if valid is None else self.seats.groups(valid)
        logits = router_logits(self.seats.groups(items), self.router[:, : items.shape[2]])
        noisy = add_noise(logits) if routing.noise and self.training else logits
        gates, chosen = noisy.softmax(dim=-1).topk(routing.top_k, dim=-1)
        priority = gates.detach()[..., 0] if routing.priority == "score" else None
        rows = self.seats.taken(chosen, grouped, routing.capacity_factor, priority)
        y = self.experts(items.flatten(0, 1), gates.flatten(0, 1), rows)
        loss = None
        if self.training and routing.balance_weight:
            loss = routing.balance_weight * importance_load_loss(logits, noisy, routing.top_k, grouped)
        return Routed(y.view_as(items), loss)


def routed_cost(routing: Routing, items: int, width: int, hidden: int, full_width: int, dtype_bytes: int) -> Cost:
    """The price of `RoutedExperts` with no choice dropped, in training.

    Autograd keeps the items, the hidden layer before the activation, probabilities and gates; for the loss the logits
    too, with and without noise. Of narrower numbers the router keeps float32 copies of the items and its weights.

    Args:
        routing: how items come to experts.
        items: N.
        width: W, of the items.
        hidden: F.
        full_width: what the experts are built for, at least W.
        dtype_bytes: of a number.
    """
    count, rows, wide = routing.experts, items * routing.top_k, max(4, dtype_bytes)
    logits = (1 + routing.noise) * count if routing.balance_weight else 0
    widened = wide * (items + count) * width if wide > dtype_bytes and items else 0
    return Cost(
        flops=2 * items * width * count + 2 * 2 * rows * width * hidden,
        activation_bytes=dtype_bytes * (items * width + rows * hidden)
        + wide * items * (count + logits + routing.top_k)
        + widened,
        parameters=count * (full_width + 2 * full_width * hidden + hidden + full_width),
    )
