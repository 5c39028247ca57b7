"""Random numbers that are the same on every machine and under every version of numpy.

Only raw words of PCG64 are drawn, which numpy promises to keep, while the methods of its `Generator` may change. The
streams of the three splits are children of the seed, so no two of them share a word.
"""

from __future__ import annotations

import math

import numpy as np

STREAMS = {"train": 0, "validation": 1, "test": 2}
"""Number of each split's stream among the children of the seed."""


class RandomWords:
    """One stream of 64-bit words and what can be made of them.

    Args:
        seed: not negative.
        stream: which child of the seed.

    Raises:
        ValueError: for a negative seed.
    """

    def __init__(self, seed: int, stream: int) -> None:
        if seed < 0:
            raise ValueError(f"the seed must not be negative, got {seed}")
        self._words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(stream,)))

    def below(self, bound: int, *shape: int) -> np.ndarray:
        """Uniform integers in 0 .. bound - 1, int64; a value is off its share by less than bound / 2^32 of it."""
        return self.below_each(np.full(shape, bound))

    def below_each(self, bounds: np.ndarray) -> np.ndarray:
        """As `below`, a bound below 2^32 for each; int64, of the bounds' shape."""
        fraction = self._raw(bounds.shape) >> np.uint64(32)
        return (fraction * bounds.astype(np.uint64) >> np.uint64(32)).astype(np.int64)

    def unit(self, *shape: int) -> np.ndarray:
        """Uniform numbers in the open interval from 0 to 1, float64."""
        return ((self._raw(shape) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def distinct(self, bound: int, count: int, rows: int) -> np.ndarray:
        """In each row `count` different integers below `bound`, in uniform random order; int64, (rows, count).

        A Fisher-Yates shuffle of all rows at once, ended after `count` steps; takes 8 * rows * bound bytes.
        """
        pool = np.tile(np.arange(bound), (rows, 1))
        row = np.arange(rows)
        for place in range(count):
            other = place + self.below(bound - place, rows)
            pool[row, other], pool[:, place] = pool[:, place].copy(), pool[row, other]
        return pool[:, :count]

    def _raw(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(self._words.random_raw(math.prod(shape))).reshape(shape)
