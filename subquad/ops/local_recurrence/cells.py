"""One step of a recurrent cell for many windows at once, forwards and backwards, with no more memory than its gates.

What W x + c of the token gives is called a, what U h + d of the state gives b; the formulas stand in
`network.py`. A step writes its gates over b, and the way back their gradients over the gates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

States = tuple[Tensor, ...]
"""What a cell hands on, (B, N, D) each: h first."""

sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward


class Step(NamedTuple):
    """What a step leaves.

    Attributes:
        before: the states before it.
        states: those after it.
        gates: (B, N, G D).
        activated: (B, N, D), the last tanh of a cell.
    """

    before: States
    states: States
    gates: Tensor
    activated: Tensor


class Cell(ABC):
    """A cell."""

    @abstractmethod
    def step_(self, given: Tensor, hidden: Tensor, states: States) -> Step:
        """One step.

        Args:
            given: (B, N, G D), a.
            hidden: (B, N, G D), b; overwritten.
            states: the last ones.
        """

    @abstractmethod
    def step_back_(self, step: Step, gradients: States, of_given: Tensor) -> States:
        """The same backwards; the gates become the gradient of b.

        Args:
            step: what it left.
            gradients: of the states after it.
            of_given: (B, N, G D), to which the gradient of a is added.

        Returns:
            Those of the states before it, but for what b brings to h.
        """


class Rnn(Cell):
    """A single tanh."""

    def step_(self, given: Tensor, hidden: Tensor, states: States) -> Step:
        """The new state stands where b was."""
        return Step(states, (hidden.add_(given).tanh_(),), hidden, hidden)

    def step_back_(self, step: Step, gradients: States, of_given: Tensor) -> States:
        """Nothing of h goes on but through b."""
        tanh_backward(gradients[0], step.activated, grad_input=step.gates)
        of_given += step.gates
        return (torch.zeros_like(step.gates),)


class Gru(Cell):
    """Gates r and z, and U h + d of the new value."""

    def step_(self, given: Tensor, hidden: Tensor, states: States) -> Step:
        """The new value stands by itself."""
        width = states[0].shape[-1]
        gates = hidden[..., : 2 * width].add_(given[..., : 2 * width]).sigmoid_()
        reset, update = gates.chunk(2, dim=-1)
        new = torch.addcmul(given[..., 2 * width :], reset, hidden[..., 2 * width :]).tanh_()
        return Step(states, (torch.lerp(new, states[0], update),), hidden, new)

    def step_back_(self, step: Step, gradients: States, of_given: Tensor) -> States:
        """The gradients of a and b differ by r where the new value is made."""
        of_next, new = gradients[0], step.activated
        reset, update, of_state = step.gates.chunk(3, dim=-1)
        kept = of_next * update
        of_sum = tanh_backward(of_next - kept, new)
        sigmoid_backward((step.before[0] - new).mul_(of_next), update, grad_input=update)
        of_reset = sigmoid_backward(of_sum * of_state, reset)
        torch.mul(of_sum, reset, out=of_state)
        reset.copy_(of_reset)
        width = new.shape[-1]
        of_given[..., : 2 * width] += step.gates[..., : 2 * width]
        of_given[..., 2 * width :] += of_sum
        return (kept,)


class Lstm(Cell):
    """Gates i, f, g and o."""

    def step_(self, given: Tensor, hidden: Tensor, states: States) -> Step:
        """States are h and c."""
        write, keep, new, show = hidden.add_(given).chunk(4, dim=-1)
        hidden[..., : 2 * new.shape[-1]].sigmoid_()
        new.tanh_()
        show.sigmoid_()
        memory = torch.addcmul(keep * states[1], write, new)
        shown = memory.tanh()
        return Step(states, (show * shown, memory), hidden, shown)

    def step_back_(self, step: Step, gradients: States, of_given: Tensor) -> States:
        """What reaches c through h and by itself goes to all gates but o."""
        (of_next, of_memory), shown = gradients, step.activated
        write, keep, new, show = step.gates.chunk(4, dim=-1)
        of_memory = tanh_backward(of_next * show, shown).add_(of_memory)
        of_write, of_last = of_memory * new, of_memory * keep
        tanh_backward(of_memory * write, new, grad_input=new)
        sigmoid_backward(of_write, write, grad_input=write)
        sigmoid_backward(of_memory * step.before[1], keep, grad_input=keep)
        sigmoid_backward(of_next * shown, show, grad_input=show)
        of_given += step.gates
        return torch.zeros_like(of_last), of_last
