"""How the next token is drawn from the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.ops.precision import wide_dtype


@dataclass(frozen=True)
class Sampling:
    """Restrictions of the distribution, applied in this order.

    Attributes:
        temperature: what logits are divided by; below 1 sharpens, above 1 flattens.
        top_k: keep the k most probable tokens; None for all.
        top_p: keep the fewest most probable tokens whose probabilities sum up to at least p (Holtzman et al. 2020,
            "The Curious Case of Neural Text Degeneration", arXiv:1904.09751); None for all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: naming the field, what was expected and what was got.
        """
        if not self.temperature > 0:
            raise ValueError(f"Sampling: temperature must be above 0, got {self.temperature}; sampling=None is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"Sampling: top_k must be at least 1, got {self.top_k}; None keeps all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_p must lie in (0, 1], got {self.top_p}; None keeps all tokens")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of logits (B, V), float32 or wider (B, V)."""
        scores = logits.to(wide_dtype(logits)) / self.temperature
        if self.top_k is not None:
            smallest = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < smallest, -torch.inf)
        if self.top_p is not None:
            ordered, tokens = scores.sort(dim=-1, descending=True, stable=True)
            before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
            dropped = torch.zeros_like(scores, dtype=torch.bool).scatter(1, tokens, before >= self.top_p)
            scores = scores.masked_fill(dropped, -torch.inf)
        return scores.softmax(dim=-1)


def choose(logits: Tensor, sampling: Sampling | None, generator: torch.Generator) -> Tensor:
    """Tokens, int64 (B,), for logits (B, V): the most probable ones without `sampling`, drawn ones with it."""
    if sampling is None:
        return logits.argmax(dim=-1)
    return torch.multinomial(sampling.probabilities(logits), 1, generator=generator)[:, 0]
