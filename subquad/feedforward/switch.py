"""Switch: one of several feed-forward networks for each token, the one that a router finds most probable.

Fedus et al. 2021, "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity",
arXiv:2101.03961.

    p = softmax(W_r x)    e = argmax p    y = p_e FFN_e(x)
    aux = α X Σ_i f_i P_i    f_i: share of the tokens with e = i, dropped ones too    P_i: mean of p_i

Cost 4 L D F + 2 L D X FLOPs; as much as an `mlp` and the router, with X times the parameters. An expert takes the first
C = ⌊N / X · capacity_factor⌋ of a group's N tokens that want it, and at least `min_capacity`; the rest get 0, and pass
by the residual. Routing is in float32, as are probabilities and gates. In training the router reads x times numbers
from [1 - jitter, 1 + jitter]; the experts read x itself.

Departures: the paper's pseudocode adds the jitter to the logits, and drops the last token that fits; the official
code, followed here, does neither. A group is the call or a sequence, where the official code cuts 1,024 tokens. Padding
is in no group, where the official code routes it and scales the loss. The experts have biases, as `mlp` has, and its
GELU; the paper has ReLU. Capacity in evaluation is that of training unless given; the official code has a factor of 2.
Tokens left behind aren't offered to the next best expert, by which the paper gains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from subquad.layers.expert_mixer import ExpertMixer, ExpertMixerConfig
from subquad.ops.experts.jitter import draw_levels, jittered_logits
from subquad.registry import register


@register("switch")
@dataclass(frozen=True, kw_only=True)
class SwitchConfig(ExpertMixerConfig):
    """Options of the Switch layer."""

    capacity_factor: float | None = 1.25
    """An expert takes this many times an equal share of a group's tokens; None for all that come to it (dropless)."""
    jitter: float = 0.01
    """ε, noise on what the router reads in training."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if not 0 <= self.jitter < 1:
            raise ValueError(f"switch: jitter must be in [0, 1), got {self.jitter}")

    @property
    def choices(self) -> int:
        """One."""
        return 1

    def build(self, embed_dim: int) -> Switch:
        """The module."""
        return Switch(self, embed_dim)

    def router_bytes(self, embed_dim: int, length: int, dtype_bytes: int) -> int:
        """With jitter the noise, eight bytes for four numbers."""
        if not self.jitter:
            return super().router_bytes(embed_dim, length, dtype_bytes)
        return 8 * -(-length * embed_dim // 4)


class Switch(ExpertMixer):
    """The most probable expert, times its probability."""

    config: SwitchConfig

    def logits(self, x: Tensor) -> Tensor:
        """In training, of x with jitter."""
        if not (self.training and self.config.jitter):
            return super().logits(x)
        return jittered_logits(x, self.router, draw_levels(x), self.config.jitter)

    def choose(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """The first of the largest probabilities."""
        chosen = probabilities.argmax(dim=-1, keepdim=True)
        return chosen, probabilities.gather(-1, chosen)
