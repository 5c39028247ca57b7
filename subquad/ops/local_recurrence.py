"""A recurrent network that begins anew for each token and reads the window of tokens that ends there.

h_t = the last state of a cell that runs, from a state of 0, over tokens t - M + 1 .. t

rnn     h' = tanh(a + b)                                        a = W x + c of the token, b = U h + d of the state
gru     r, z = σ(a₁ + b₁), σ(a₂ + b₂)      n = tanh(a₃ + r ⊙ b₃)      h' = n + z ⊙ (h - n)
lstm    i, f, g, o = σ, σ, tanh, σ (a + b)      c' = f ⊙ c + i ⊙ g      h' = o ⊙ tanh(c')
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.precision import full_precision

Cell = Literal["rnn", "gru", "lstm"]
States = tuple[Tensor, ...]
"""What a cell hands on: h first."""

GATES: dict[str, int] = {"rnn": 1, "gru": 3, "lstm": 4}
"""Vectors as wide as the state that a cell needs of each token."""

SLICE = 2**20
"""Numbers in the gates of all windows that run together, so that a step finds them in the cache."""


def local_recurrence_by_windows(
    given: Tensor, weights: Tensor, biases: Tensor | None, *, cell: Cell, window: int
) -> Tensor:
    """The definition, one window after the other; arguments and result as in `local_recurrence`."""
    rows = []
    for end in range(window, given.shape[1] + 1):
        states = _empty(given[:, 0], weights)
        for token in given[:, end - window : end].unbind(dim=1):
            states = STEPS[cell](token, F.linear(states[0], weights, biases), states)
        rows.append(states[0])
    return torch.stack(rows, dim=1)


def local_recurrence(given: Tensor, weights: Tensor, biases: Tensor | None, *, cell: Cell, window: int) -> Tensor:
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
    return _LocalRecurrence.apply(given, weights, biases, STEPS[cell], window)  # pyright: ignore[reportReturnType] - untyped


class _LocalRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, given: Tensor, weights: Tensor, biases: Tensor | None, step: Callable[..., States], window: int
    ) -> Tensor:
        ctx.save_for_backward(given, weights, biases)
        ctx.step, ctx.window = step, window
        wide = torch.promote_types(given.dtype, torch.float32)
        weights, biases = weights.to(wide), None if biases is None else biases.to(wide)
        with full_precision(given.device):
            parts = [_run(step, tokens, weights, biases) for _, tokens in _slices(given, window, wide)]
        return torch.cat(parts, dim=1).to(given.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        given, *saved = ctx.saved_tensors
        wide = torch.promote_types(given.dtype, torch.float32)
        learned = [tensor.detach().to(wide).requires_grad_() for tensor in saved if tensor is not None]
        weights, biases = learned[0], learned[1] if len(learned) > 1 else None
        of_given, totals = torch.zeros_like(given, dtype=wide), [torch.zeros_like(tensor) for tensor in learned]
        for start, tokens in _slices(given, ctx.window, wide):
            leaves = [token.detach().requires_grad_() for token in tokens]
            count = leaves[0].shape[1]
            with torch.enable_grad(), full_precision(given.device):
                out = _run(ctx.step, leaves, weights, biases)
            wanted = grad[:, start : start + count].to(wide)
            found = torch.autograd.grad(out, [*leaves, *learned], wanted, allow_unused=True, materialize_grads=True)
            for shift, of_tokens in enumerate(found[: ctx.window]):
                of_given[:, start + shift : start + shift + count] += of_tokens
            for total, part in zip(totals, found[ctx.window :], strict=True):
                total += part
        of_biases = totals[1].to(saved[1].dtype) if biases is not None else None
        return of_given.to(given.dtype), totals[0].to(saved[0].dtype), of_biases, None, None


def _slices(given: Tensor, window: int, dtype: torch.dtype) -> list[tuple[int, list[Tensor]]]:
    """The first window of each slice, and the slice's first, second, ... tokens, M times (B, N, G D)."""
    batch_size, tokens, width = given.shape
    length = tokens - window + 1
    size = max(1, SLICE // (max(1, batch_size) * width))
    return [
        (start, [given[:, start + s : min(start + size, length) + s].to(dtype) for s in range(window)])
        for start in range(0, length, size)
    ]


def _run(step: Callable[..., States], tokens: list[Tensor], weights: Tensor, biases: Tensor | None) -> Tensor:
    """The last h (B, N, D) of windows whose tokens are given one by one; of a state of 0 the product is known."""
    states = _empty(tokens[0], weights)
    of_nothing = torch.zeros_like(tokens[0][:1, :1]) if biases is None else biases
    states = step(tokens[0], of_nothing, states)
    for token in tokens[1:]:
        states = step(token, F.linear(states[0], weights, biases), states)
    return states[0]


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
