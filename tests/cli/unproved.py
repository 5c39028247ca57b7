"""A mechanism of a user's own, and a way past the proofs: they have their own tests, and take most of the time.

A file named among the mixers is run in the worker before anything else.
"""

import time
from dataclasses import dataclass

from torch import Tensor

from subquad.benchmark import proving
from subquad.interface import Dims
from subquad.layers.heads import Heads
from subquad.mechanisms.full import Full, FullConfig
from subquad.state import State

print("the file is run")
proving.run_probes = lambda config, dims, *, seed=0: []


@dataclass(frozen=True, kw_only=True)
class UnprovedConfig(FullConfig):
    """Dense attention, as slow in training as is asked for."""

    seconds: float = 0.0

    def build(self, dims: Dims) -> Full:
        return Slow(self, dims)


class Slow(Full):
    def attend(self, heads: Heads, state: State | None) -> tuple[Tensor, State | None]:
        assert isinstance(self.config, UnprovedConfig)
        if self.training and self.config.seconds:
            time.sleep(self.config.seconds)
            print("said in training")
        return super().attend(heads, state)
