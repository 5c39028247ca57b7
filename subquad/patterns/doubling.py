"""The distances of LogSparse: a window, and beyond it distances that double; Li et al. 2019, arXiv:1907.00235.

i - j < n or i - j = n - 1 + 2^m        restart: (i - j) mod R likewise        both sides: |i - j| likewise
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from subquad.patterns.pattern import Pattern
from subquad.patterns.terms import UNBOUNDED, Classes, Indices, Term, classify


@dataclass(frozen=True)
class DoublingDistances(Pattern):
    """The distances i - j of the formula; those of |i - j| where `both` sides are seen."""

    local: int
    restart: int | None
    both: bool

    def steps(self, limit: int) -> list[int]:
        """The distances below `limit` and below the first restart, ascending."""
        limit = limit if self.restart is None else min(limit, self.restart)
        beyond = (self.local - 1 + (1 << power) for power in range(max(0, limit).bit_length()))
        return [*range(min(self.local, limit)), *(distance for distance in beyond if distance < limit)]

    def pairs(self, length: int) -> int:
        """Visible pairs among `length` tokens: length - d of them for each distance d."""
        period, past = self.restart or length, 0
        for step in self.steps(length):
            times = (length - 1 - step) // period + 1
            past += times * (length - step) - period * (times * (times - 1) // 2)
        return 2 * past - length if self.both else past

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """A power of two has one bit."""
        distance = i - j
        step = distance.abs() if self.restart is None else distance.abs() % self.restart
        beyond = step - (self.local - 1)
        chosen = (beyond <= 0) | (beyond & (beyond - 1) == 0)
        return chosen if self.both else chosen & (distance >= 0)

    def tiles(self, i0: Indices, i1: Indices, j0: Indices, j1: Indices) -> Classes:
        """By counting the distances between the smallest and the largest of a rectangle."""
        lowest, highest = i0 - j1, i1 - j0
        count = np.maximum(self._before(highest + 1) - self._before(lowest), 0)
        if self.both:
            count = count + np.maximum(self._before(1 - lowest) - self._before(np.maximum(-highest, 1)), 0)
        return classify(count > 0, count == highest - lowest + 1)

    def offsets(self) -> tuple[int, int]:
        """The past, or both sides."""
        return -UNBOUNDED if self.both else 0, UNBOUNDED

    def terms(self) -> list[Term]:
        """A window, and single distances beyond it, unless they start anew."""
        if self.restart is not None:
            return [Term(*self.offsets(), filters=(self,))]
        near = self.local + 1  # the first two powers of two follow without a gap
        single = self.steps(UNBOUNDED)[near + 1 :]
        future = [Term(-distance, -distance) for distance in single] if self.both else []
        return [Term(-near if self.both else 0, near), *(Term(distance, distance) for distance in single), *future]

    @property
    def by_distance(self) -> bool:
        """Always."""
        return True

    def _before(self, distance: Indices) -> Indices:
        """How many of the distances are below the given ones."""
        period = self.restart or UNBOUNDED
        steps = np.array(self.steps(period), dtype=np.int64)
        whole, rest = np.divmod(np.maximum(distance, 0), period)
        return whole * len(steps) + np.searchsorted(steps, rest)
