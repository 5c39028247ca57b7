"""How a training ends that no score can come of, on one process or many."""

from __future__ import annotations


class DivergenceError(Exception):
    """A loss was not finite."""

    def __init__(self, split: str, step: int, loss: float) -> None:
        super().__init__(f"the {split} loss became {loss} at step {step}; try a lower learning rate")
        self.step = step
