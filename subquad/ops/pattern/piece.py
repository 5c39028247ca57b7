"""A piece of a compiled pattern, and the tensors that pieces work on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from subquad.ops.pattern.example_facts import ExampleFacts
from subquad.ops.pattern.strips import Shape


class Work(NamedTuple):
    """Some heads of one example.

    Attributes:
        q: (G, L, E).
        k: (G, S, E).
        v: (G, S, E).
        out: (G, L, E), the merged result so far; in the backward pass the final one.
        lse: (G, L), the merged log-sum-exp so far, -inf where nothing was seen; in the backward pass final and finite.
        facts: what restricts this example.
        offset: absolute position of query 0.
        scale: factor of the scores.
        fresh: whether the queries of the piece have seen no other, so that results are written and not merged.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    facts: ExampleFacts
    offset: int
    scale: float
    fresh: bool


class Gradients(NamedTuple):
    """Gradients beside `Work`: of the results, given, and of the inputs, added up.

    Attributes:
        out: (G, L, E).
        lse: (G, L), or None where nothing depends on the log-sum-exp.
        q: (G, L, E).
        k: (G, S, E).
        v: (G, S, E).
    """

    out: Tensor
    lse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor


class Piece(ABC):
    """Part of a pattern, disjoint from the other parts."""

    @property
    @abstractmethod
    def empty(self) -> bool:
        """Whether nothing is left to compute."""

    @abstractmethod
    def price(self, shape: Shape) -> float:
        """What it costs for one head, in pairs of dense attention."""

    @property
    @abstractmethod
    def signature(self) -> Hashable:
        """Equal only for pieces that compute the same, whatever the head; None where that isn't known."""

    @abstractmethod
    def covered(self, length: int) -> NDArray[np.bool_]:
        """Which of `length` queries the piece computes, bool (length,)."""

    @abstractmethod
    def forward(self, work: Work) -> None:
        """Merge this part into `work.out` and `work.lse`."""

    @abstractmethod
    def backward(self, work: Work, gradients: Gradients) -> None:
        """Add this part's share to the gradients of q, k and v."""
