"""A recurrent network that begins anew for each token and reads the window of tokens that ends there.

h_t = the last state of a cell that runs, from a state of 0, over tokens t - M + 1 .. t

rnn     h' = tanh(a + b)                                        a = W x + c of the token, b = U h + d of the state
gru     r, z = σ(a₁ + b₁), σ(a₂ + b₂)      n = tanh(a₃ + r ⊙ b₃)      h' = n + z ⊙ (h - n)
lstm    i, f, g, o = σ, σ, tanh, σ (a + b)      c' = f ⊙ c + i ⊙ g      h' = o ⊙ tanh(c')
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.local_recurrence.cells import Cell, Gru, Lstm, Rnn, States, Step
from subquad.ops.onednn import product, product_over_rows
from subquad.ops.precision import full_precision, wide_dtype

CellName = Literal["rnn", "gru", "lstm"]

GATES: dict[str, int] = {"rnn": 1, "gru": 3, "lstm": 4}
"""Vectors as wide as the state that a cell needs of each token."""

SLICE = 2**20
"""Numbers in the gates of all windows that run together, so that a step finds them in the cache."""

CELLS: dict[str, Cell] = {"rnn": Rnn(), "gru": Gru(), "lstm": Lstm()}


def local_recurrence_by_windows(
    given: Tensor, weights: Tensor, biases: Tensor | None, *, cell: CellName, window: int
) -> Tensor:
    """The definition, one window after the other; arguments and result as in `local_recurrence`."""
    rows = []
    for end in range(window, given.shape[1] + 1):
        states = _empty(given[:, 0], weights)
        for token in given[:, end - window : end].unbind(dim=1):
            states = STEPS[cell](token, F.linear(states[0], weights, biases), states)
        rows.append(states[0])
    return torch.stack(rows, dim=1)


def local_recurrence(given: Tensor, weights: Tensor, biases: Tensor | None, *, cell: CellName, window: int) -> Tensor:
    """All windows side by side, in float32 or wider and not narrowed by autocast; autograd keeps the arguments alone.

    A slice of windows runs at a time, and again in the backward pass.

    Args:
        given: (B, M - 1 + L, G D), W x + c of each token, and of the M - 1 before the first.
        weights: (G D, D), U; rows as in torch's cells.
        biases: (G D,), d, or None for 0.
        cell: which network.
        window: M, at least 1.

    Returns:
        (B, L, D), the dtype of `given`.
    """
    return _LocalRecurrence.apply(given, weights, biases, cell, window)  # pyright: ignore[reportReturnType] - untyped


class _LocalRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, weights: Tensor, biases: Tensor | None, cell: CellName, window: int) -> Tensor:
        ctx.save_for_backward(given, weights, biases)
        ctx.cell, ctx.window = cell, window
        run = _Run.of(given, weights, biases, cell)
        out = given.new_empty(given.shape[0], given.shape[1] - window + 1, weights.shape[1])
        with full_precision(given.device):
            for windows in _slices(given, window):
                last = deque(run.steps(windows, window), maxlen=1).pop()
                out[:, windows] = last.states[0]
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        given, weights, biases = ctx.saved_tensors
        run = _Run.of(given, weights, biases, ctx.cell)
        of_given, of_weights = (torch.zeros_like(x, dtype=run.weights.dtype) for x in (given, weights))
        of_biases = of_weights.new_zeros(len(weights))
        with full_precision(given.device):
            for windows in _slices(given, ctx.window):
                steps, gradients = list(run.steps(windows, ctx.window)), run.last_gradients(grad[:, windows])
                for shift, step in reversed(list(enumerate(steps))):
                    gradients = run.cell.step_back_(step, gradients, of_given[:, _shifted(windows, shift)])
                    of_hidden = step.gates.flatten(0, 1)
                    of_biases += of_hidden.sum(dim=0)
                    if shift:
                        of_weights += product_over_rows(of_hidden, step.before[0].flatten(0, 1))
                        gradients[0].add_(product(of_hidden, run.weights.mT).view_as(gradients[0]))
        found = None if biases is None else of_biases.to(biases.dtype)
        return of_given.to(given.dtype), of_weights.to(weights.dtype), found, None, None


class _Run(NamedTuple):
    """What all steps of a call share, in float32 or wider but for the tokens.

    Attributes:
        given: (B, M - 1 + L, G D).
        weights: (G D, D).
        biases: (G D,) or None.
        cell: which.
    """

    given: Tensor
    weights: Tensor
    biases: Tensor | None
    cell: Cell

    @classmethod
    def of(cls, given: Tensor, weights: Tensor, biases: Tensor | None, cell: CellName) -> _Run:
        """The arguments of `local_recurrence`."""
        wide = wide_dtype(given)
        return cls(given, weights.to(wide), None if biases is None else biases.to(wide), CELLS[cell])

    def steps(self, windows: slice, window: int) -> Iterator[Step]:
        """All steps of neighbouring windows."""
        states = _empty(self.given[:, windows].to(self.weights.dtype), self.weights)
        for shift in range(window):
            step = self.step(states, _shifted(windows, shift), first=shift == 0)
            states = step.states
            yield step

    def last_gradients(self, grad: Tensor) -> States:
        """Those of the last states, of which only h is seen."""
        grad = grad.to(self.weights.dtype)
        return grad, torch.zeros_like(grad)

    def step(self, states: States, tokens: slice, *, first: bool) -> Step:
        """A step; of a state of 0 the product is known."""
        given = self.given[:, tokens].to(self.weights.dtype)
        if first:
            hidden = torch.zeros_like(given, memory_format=torch.contiguous_format)
            hidden = hidden if self.biases is None else hidden.add_(self.biases)
        else:
            hidden = product(states[0].flatten(0, 1), self.weights, self.biases).view(given.shape)
        return self.cell.step_(given, hidden, states)


def _slices(given: Tensor, window: int) -> list[slice]:
    """The windows that run together."""
    batch_size, tokens, width = given.shape
    length = tokens - window + 1
    size = max(1, SLICE // (max(1, batch_size) * width))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _shifted(windows: slice, shift: int) -> slice:
    return slice(windows.start + shift, windows.stop + shift)


def _empty(token: Tensor, weights: Tensor) -> States:
    nothing = token.new_zeros(*token.shape[:-1], weights.shape[1])
    return nothing, nothing


def _rnn_step(given: Tensor, hidden: Tensor, states: States) -> States:
    return ((given + hidden).tanh(),)


def _gru_step(given: Tensor, hidden: Tensor, states: States) -> States:
    width = states[0].shape[-1]
    reset, update = (given[..., : 2 * width] + hidden[..., : 2 * width]).sigmoid().chunk(2, dim=-1)
    new = torch.addcmul(given[..., 2 * width :], reset, hidden[..., 2 * width :]).tanh()
    return (torch.lerp(new, states[0], update),)


def _lstm_step(given: Tensor, hidden: Tensor, states: States) -> States:
    write, keep, new, show = (given + hidden).chunk(4, dim=-1)
    memory = torch.addcmul(keep.sigmoid() * states[1], write.sigmoid(), new.tanh())
    return show.sigmoid() * memory.tanh(), memory


STEPS: dict[str, Callable[[Tensor, Tensor, States], States]] = {"rnn": _rnn_step, "gru": _gru_step, "lstm": _lstm_step}
"""A cell's next states from W x + c, U h + d and its states."""
