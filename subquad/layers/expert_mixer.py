"""What channel mixers that route tokens to experts share: router, stacked experts, capacity, balance.

A mechanism chooses experts and gates from the router's probabilities (`choose`), and may change what the router reads
and what is added to the loss.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.interface import ChannelMixer, FeedforwardConfig, Mixed
from subquad.layers.expert_seats import Group, Seats
from subquad.layers.stacked_experts import StackedExperts
from subquad.mask import Mask
from subquad.ops.experts.routing import balance_loss, router_logits


@dataclass(frozen=True, kw_only=True)
class ExpertMixerConfig(FeedforwardConfig):
    """Options of every channel mixer with experts."""

    experts: int = 8
    """X, feed-forward networks side by side."""
    hidden_dim: int | None = None
    """F, width of the hidden layer of an expert; None for 4 D."""
    activation: Literal["gelu", "relu"] = "gelu"
    """σ."""
    capacity_factor: float | None = None
    """An expert takes this many times an equal share of a group's choices; None for all that come to it (dropless)."""
    evaluation_capacity_factor: float | None = None
    """The same in evaluation, where there is one in training; None for the same number."""
    min_capacity: int = 4
    """Choices that an expert takes in any case."""
    group: Group = "batch"
    """What shares the capacity and is to be balanced: all tokens of a call, or each sequence for itself."""
    balance_weight: float = 0.01
    """α, weight of the load-balancing loss."""
    init_scale: float = 0.1
    """s: weights are drawn with variance s / fan-in."""
    expert_dropout: float | None = None
    """Rate after the activation, inside the experts; None for `dropout`."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        self.check_least({"experts": 1, "hidden_dim": 1, "min_capacity": 0, "balance_weight": 0})
        for option in ("capacity_factor", "evaluation_capacity_factor", "init_scale"):
            value = getattr(self, option)
            if value is not None and value <= 0:
                raise ValueError(f"{self.name}: {option} must be above 0, got {value}")
        for option in ("dropout", "expert_dropout"):
            value = getattr(self, option)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{self.name}: {option} must be in [0, 1), got {value}")
        if self.capacity_factor is None and self.evaluation_capacity_factor is not None:
            raise ValueError(
                f"{self.name}: evaluation_capacity_factor={self.evaluation_capacity_factor} goes with a "
                "capacity_factor in training, which is None (dropless)"
            )

    @property
    def position_wise(self) -> bool:
        """Where tokens neither compete for seats nor share a loss."""
        return self.capacity_factor is None and self.balance_weight == 0

    @property
    @abstractmethod
    def choices(self) -> int:
        """k, experts of a token."""

    def width(self, embed_dim: int) -> int:
        """F."""
        return 4 * embed_dim if self.hidden_dim is None else self.hidden_dim

    def cost(self, embed_dim: int, length: int, dtype_bytes: int) -> Cost:
        """With no choice dropped, in training: x, the hidden layer before the activation, probabilities and gates."""
        hidden, wide = self.width(embed_dim), max(4, dtype_bytes)
        rows = length * self.choices
        router = length * (self.experts + self.choices) + (self.experts if self.balance_weight else 0)
        read = self.router_bytes(embed_dim, length, dtype_bytes)
        return Cost(
            flops=2 * length * embed_dim * self.experts + 2 * 2 * rows * embed_dim * hidden,
            activation_bytes=dtype_bytes * (length * embed_dim + rows * hidden) + wide * router + read,
            parameters=self.experts * (embed_dim + 2 * embed_dim * hidden + hidden + embed_dim),
        )

    def router_bytes(self, embed_dim: int, length: int, dtype_bytes: int) -> int:
        """What the router keeps besides x: of narrower numbers float32 copies of x and its weights."""
        return 0 if dtype_bytes >= 4 else 4 * (length + self.experts) * embed_dim


class ExpertMixer(ChannelMixer):
    """Stacked experts, and a router in float32."""

    def __init__(self, config: ExpertMixerConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.seats = Seats(
            owner=config.name, item="token", experts=config.experts, group=config.group, least=config.min_capacity
        )
        self.router = nn.Parameter(torch.empty(config.experts, embed_dim))
        self.experts = StackedExperts(
            config.experts,
            embed_dim,
            config.width(embed_dim),
            activation=config.activation,
            dropout=config.dropout if config.expert_dropout is None else config.expert_dropout,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.initialise()

    def initialise(self) -> None:
        """Weights from a normal distribution of variance s / fan-in, cut at two standard deviations; biases 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
                continue
            deviation = (self.config.init_scale / parameter.shape[-1]) ** 0.5
            nn.init.trunc_normal_(parameter, std=deviation, a=-2 * deviation, b=2 * deviation)

    @abstractmethod
    def choose(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """From probabilities (G, N, X), the experts, int64 (G, N, k), and their gates, of the same shape."""

    def logits(self, x: Tensor) -> Tensor:
        """The router's, (..., X) of x (..., D), in float32 or wider."""
        return router_logits(x, self.router)

    def auxiliary_loss(
        self, logits: Tensor, probabilities: Tensor, chosen: Tensor, valid: Tensor | None
    ) -> Tensor | None:
        """What is added to the loss in training, a scalar, from the router's results (G, N, X); None for nothing."""
        if not self.config.balance_weight:
            return None
        return self.config.balance_weight * balance_loss(probabilities, chosen, valid)

    def forward(self, x: Tensor, *, mask: Mask | None = None) -> Mixed:
        """Each token of x (B, L, D) through its experts; invalid ones go nowhere.

        Raises:
            ValueError: a mask that doesn't go with x.
        """
        if mask is not None:
            mask.check(self.config.name, x)
            x = mask.zero_invalid(x)
        valid = None if mask is None or mask.valid is None else self.seats.groups(mask.valid)
        logits = self.logits(self.seats.groups(x))
        probabilities = logits.softmax(dim=-1)
        chosen, gates = self.choose(probabilities)
        rows = self.seats.taken(chosen, valid, self._capacity_factor())
        y = self.experts(x.flatten(0, 1), gates.flatten(0, 1), rows)
        loss = self.auxiliary_loss(logits, probabilities, chosen, valid) if self.training else None
        return Mixed(self.dropout(y.view_as(x)), None, None if loss is None else loss.float())

    def _capacity_factor(self) -> float | None:
        factor = self.config.capacity_factor
        return factor if self.training else self.config.evaluation_capacity_factor or factor

    def extra_repr(self) -> str:
        """The config, for `print(module)`."""
        return repr(self.config)
