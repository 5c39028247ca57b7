"""What a caller chooses of how regions are summarised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """`Summarize` but for its weights, so that it can be remembered by.

    Attributes:
        reduce: "max", "mean" or "sum".
        rectified: whether negative features count as 0.
        log_size: whether a region's score grows by the logarithm of its size.
    """

    reduce: str
    rectified: bool
    log_size: bool


@dataclass(frozen=True)
class Summarize:
    """How the query and the key that summarise a region are made of its tokens'.

    Attributes:
        reduce: over the tokens of the region, elementwise.
        activation: applied before: nothing, max(x, 0), or max(x Wᵀ, 0), which makes it a DeepSets function.
        query_weight: W of the queries, (E, E), shared by all heads; for "deepset" alone.
        key_weight: W of the keys, (E, E).
        log_size: add the logarithm of the number of its tokens to the score of a region. With equal keys in every
            region the result is then softmax attention.
    """

    reduce: Literal["max", "mean", "sum"] = "max"
    activation: Literal["identity", "relu", "deepset"] = "identity"
    query_weight: Tensor | None = None
    key_weight: Tensor | None = None
    log_size: bool = False

    @property
    def options(self) -> Options:
        """All but the weights."""
        return Options(self.reduce, self.activation != "identity", self.log_size)
