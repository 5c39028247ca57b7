"""Feed-forward networks side by side, each for its own tokens: products of contiguous rows, one for each expert.

N tokens, D channels, F hidden ones, X experts, M rows: pairs of a token and an expert that it goes to.

    y_t = Σ over the rows of t of gate · (W₂ σ(W₁ x_t + b₁) + b₂)     with the weights of the row's expert

No row is padding. Autograd keeps the tokens, the hidden rows before the activation, and the gates.

Products are called one expert after the other, not by `F.grouped_mm` of torch 2.13: on the CPU that is the same loop of
`mm`, each with a read of its offset, and it takes no float64, no bias, and only rows that are multiples of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.experts.routing import ExpertRows
from subquad.ops.onednn import product, product_over_rows
from subquad.ops.precision import autocast_dtype, full_precision


class ExpertWeights(NamedTuple):
    """Parameters of all experts, stacked.

    Attributes:
        expand: (X, F, D).
        expand_bias: (X, F).
        contract: (X, D, F).
        contract_bias: (X, D).
    """

    expand: Tensor
    expand_bias: Tensor
    contract: Tensor
    contract_bias: Tensor


class Activation(NamedTuple):
    """σ, and its backward: of a gradient and σ's argument."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "relu": Activation(F.relu, lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0)),
}


def experts_by_rows(
    x: Tensor, gates: Tensor, weights: ExpertWeights, rows: ExpertRows, activation: Activation
) -> Tensor:
    """The definition, one row after the other. Arguments and result as in `experts`, without dropout."""
    y = [torch.zeros_like(token) for token in x]
    of_row = [expert for expert, count in enumerate(rows.counts) for _ in range(count)]
    for token, choice, e in zip(rows.tokens.tolist(), rows.choices.tolist(), of_row, strict=True):
        hidden = activation.forward(weights.expand[e] @ x[token] + weights.expand_bias[e])
        out = weights.contract[e] @ hidden + weights.contract_bias[e]
        y[token] = y[token] + gates[token, choice].to(x.dtype) * out
    return torch.stack(y) if y else torch.zeros_like(x)


def experts(
    x: Tensor,
    gates: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    activation: Activation,
    dropout: float = 0.0,
) -> Tensor:
    """Every token through its experts; autocast narrows the products.

    Args:
        x: (N, D).
        gates: (N, k), float32 or wider.
        weights: of all experts.
        rows: who goes where.
        activation: σ.
        dropout: rate on the hidden layer, drawn from torch's generator.

    Returns:
        (N, D), the dtype of x; 0 for a token without rows.
    """
    narrow = autocast_dtype(x)
    narrowed = [tensor.to(narrow) for tensor in (x, *weights)]
    with full_precision(x.device):
        y = _Experts.apply(rows, activation, dropout, gates, *narrowed)
    return y.to(x.dtype)  # pyright: ignore[reportAttributeAccessIssue] - `apply` is untyped


class _Run(NamedTuple):
    """The rows of one expert."""

    expert: int
    tokens: Tensor
    choices: Tensor


def _runs(tokens: Tensor, choices: Tensor, counts: tuple[int, ...]) -> Iterator[_Run]:
    """All experts that have rows."""
    parts = zip(tokens.split(counts), choices.split(counts), strict=True)
    return (_Run(expert, *part) for expert, part in enumerate(parts) if counts[expert])


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: ExpertRows,
        activation: Activation,
        dropout: float,
        gates: Tensor,
        x: Tensor,
        *stacked: Tensor,
    ) -> Tensor:
        weights, y = ExpertWeights(*stacked), torch.zeros_like(x)
        before, kept = [], []
        for run in _runs(rows.tokens, rows.choices, rows.counts):
            e = run.expert
            before.append(product(x.index_select(0, run.tokens), weights.expand[e], weights.expand_bias[e]))
            hidden = activation.forward(before[-1])
            if dropout:
                kept.append(torch.rand_like(hidden) >= dropout)
                hidden = hidden * kept[-1] / (1 - dropout)
            out = product(hidden, weights.contract[e], weights.contract_bias[e])
            gate = gates[run.tokens, run.choices].to(x.dtype)
            y.index_add_(0, run.tokens, out.mul_(gate[:, None]))
        ctx.activation, ctx.dropout, ctx.counts = activation, dropout, rows.counts
        ctx.save_for_backward(rows.tokens, rows.choices, gates, x, *stacked, *before, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        tokens, choices, gates, x, *rest = ctx.saved_tensors
        weights, kept = ExpertWeights(*rest[:4]), rest[4:]
        of_x, of_gates, of_weights = torch.zeros_like(x), torch.zeros_like(gates), _gradients(weights, ctx.counts)
        for index, run in enumerate(_runs(tokens, choices, ctx.counts)):
            e, before = run.expert, kept[index]
            hidden = ctx.activation.forward(before)
            upstream = grad.index_select(0, run.tokens)
            of_hidden = product(upstream, weights.contract[e].mT)
            if ctx.dropout:
                passed = kept[len(kept) // 2 + index].to(x.dtype) / (1 - ctx.dropout)
                hidden, of_hidden = hidden * passed, of_hidden * passed
            if ctx.needs_input_grad[3]:
                out_times_upstream = (of_hidden * hidden).sum(dim=-1) + upstream @ weights.contract_bias[e]
                of_gates[run.tokens, run.choices] = out_times_upstream.to(gates.dtype)
            gate = gates[run.tokens, run.choices].to(x.dtype)[:, None]
            upstream.mul_(gate)
            of_before = ctx.activation.backward(of_hidden.mul_(gate), before)
            of_weights.contract[e] = product_over_rows(upstream, hidden)
            of_weights.contract_bias[e] = upstream.sum(dim=0)
            of_weights.expand[e] = product_over_rows(of_before, x.index_select(0, run.tokens))
            of_weights.expand_bias[e] = of_before.sum(dim=0)
            of_x.index_add_(0, run.tokens, product(of_before, weights.expand[e].mT))
        return None, None, None, of_gates, of_x, *of_weights


def _gradients(weights: ExpertWeights, counts: tuple[int, ...]) -> ExpertWeights:
    """Room for those of the weights; 0 for experts without rows."""
    found = ExpertWeights(*(torch.empty_like(tensor) for tensor in weights))
    without_rows = [expert for expert, count in enumerate(counts) if not count]
    for tensor in found:
        tensor[without_rows] = 0
    return found
