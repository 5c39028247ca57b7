"""MoE: the few feed-forward networks for each token that a router finds most probable, averaged.

Shazeer et al. 2017, "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
arXiv:1701.06538; the losses are those of Switch (2101.03961) and ST-MoE (2202.08906).

    p = softmax(W_r x)    T = the k experts with the largest p    y = Σ_{i in T} p_i / (Σ_{j in T} p_j) FFN_i(x)
    aux = α X Σ_i f_i P_i + β mean (log Σ_i exp (W_r x)_i)²

f_i is the share of all choices that fall on expert i, P_i the mean of p_i; so the first term is α where both are equal.

Cost 4 L k D F + 2 L D X FLOPs. With a capacity an expert takes the first ⌊k N / X · capacity_factor⌋ choices of a
group's N tokens; what a token gets of other experts stays as it is.

Departures: no noise on the logits, and one balance loss in place of those for importance and load, as in what followed
the paper. Seats are taken in the order of the tokens, where GShard seats all first choices before any second one: there
a later token could take an earlier one's seat. The experts are those of `mlp`. No capacity unless given.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from subquad.costs import Cost
from subquad.layers.expert_mixer import ExpertMixer, ExpertMixerConfig
from subquad.ops.experts.routing import z_loss
from subquad.registry import register


@register("moe")
@dataclass(frozen=True, kw_only=True)
class MoeConfig(ExpertMixerConfig):
    """Options of the mixture of experts."""

    top_k: int = 2
    """k, experts of a token."""
    renormalise: bool = True
    """Divide the gates of a token by their sum."""
    z_weight: float = 0.001
    """β, weight of the loss that keeps the logits small."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"moe: top_k must be at least 1 and at most experts={self.experts}, got {self.top_k}")
        self.check_least({"z_weight": 0})
        if self.top_k == 1 and self.renormalise and self.experts > 1:
            raise ValueError(
                "moe: with top_k=1 a renormalised gate is always 1, so that the router learns nothing from it; use "
                "renormalise=False, or switch"
            )

    @property
    def position_wise(self) -> bool:
        """Where tokens neither compete for seats nor share a loss."""
        return super().position_wise and self.z_weight == 0

    @property
    def choices(self) -> int:
        """As many as `top_k`."""
        return self.top_k

    def build(self, embed_dim: int) -> Moe:
        """The module."""
        return Moe(self, embed_dim)

    def cost(self, embed_dim: int, length: int, dtype_bytes: int) -> Cost:
        """Renormalised gates are kept before and after, with their sum; for the second loss logits and normalisers."""
        gates = self.top_k + 1 if self.renormalise else 0
        logits = self.experts + 1 if self.z_weight else 0
        kept = Cost(activation_bytes=max(4, dtype_bytes) * length * (gates + logits))
        return super().cost(embed_dim, length, dtype_bytes) + kept


class Moe(ExpertMixer):
    """The k most probable experts."""

    config: MoeConfig

    def choose(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """The largest probabilities, divided by their sum if so asked."""
        gates, chosen = probabilities.topk(self.config.top_k, dim=-1)
        return chosen, gates / gates.sum(dim=-1, keepdim=True) if self.config.renormalise else gates

    def auxiliary_loss(
        self, logits: Tensor, probabilities: Tensor, chosen: Tensor, valid: Tensor | None
    ) -> Tensor | None:
        """Balance, and the size of the logits."""
        balance = super().auxiliary_loss(logits, probabilities, chosen, valid)
        if not self.config.z_weight:
            return balance
        size = self.config.z_weight * z_loss(logits, valid)
        return size if balance is None else balance + size
