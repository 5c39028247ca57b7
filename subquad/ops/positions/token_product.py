"""One matrix that mixes the tokens of every channel alike.

y_i = Σ_j w_ij x_j        causal: j <= i
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.onednn import product
from subquad.ops.precision import full_precision

BLOCK = 512
"""Tokens whose row of products runs at once; a causal one computes, beside the visible pairs, half a block for each."""


def token_product_at_once(weights: Tensor, x: Tensor, *, causal: bool) -> Tensor:
    """The definition; arguments and result as in `token_product`."""
    seen = weights.tril() if causal else weights
    return torch.einsum("ij,bjf->bif", seen.to(x.dtype), x)


def token_product(weights: Tensor, x: Tensor, *, causal: bool) -> Tensor:
    """The product in blocks of rows, never narrowed by autocast; autograd keeps the arguments alone.

    Args:
        weights: (L, L), from token j in column j to token i in row i.
        x: (B, L, F).
        causal: whether only columns j <= i count.

    Returns:
        (B, L, F), the dtype of x.
    """
    return _TokenProduct.apply(weights.to(x.dtype), x, causal)  # pyright: ignore[reportReturnType] - it is untyped


class _TokenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, x: Tensor, causal: bool) -> Tensor:
        ctx.save_for_backward(weights, x)
        ctx.causal = causal
        tokens = _folded(x)
        with full_precision(x.device):
            rows = [visible_product(weights, tokens, start, causal=causal) for start in range(0, len(tokens), BLOCK)]
        return _unfolded(torch.cat(rows), x)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        weights, x = ctx.saved_tensors
        of_rows, tokens, wants_weights = _folded(grad), _folded(x), ctx.needs_input_grad[0]
        of_weights, of_tokens = torch.zeros_like(weights) if wants_weights else None, torch.zeros_like(tokens)
        with full_precision(x.device):
            for start in range(0, len(tokens), BLOCK):
                block, last = slice(start, start + BLOCK), start + BLOCK if ctx.causal else len(tokens)
                rows = weights[block, :last].tril(start) if ctx.causal else weights[block]
                of_tokens[:last].addmm_(rows.mT, of_rows[block])
                if of_weights is not None:
                    of_block = product(of_rows[block], tokens[:last])
                    of_weights[block, :last] = of_block.tril(start) if ctx.causal else of_block
        return of_weights, _unfolded(of_tokens, x), None


def visible_product(weights: Tensor, tokens: Tensor, start: int, *, causal: bool) -> Tensor:
    """The rows from `start` of a block: (R, N) of the weights (L, L) and tokens (L, N)."""
    rows = weights[start : start + BLOCK]
    if not causal:
        return product(rows, tokens.mT)
    reach = start + rows.shape[0]
    return product(rows[:, :reach].tril(start), tokens[:reach].mT)


def _folded(x: Tensor) -> Tensor:
    """(B, L, F) -> (L, B * F), contiguous."""
    return x.transpose(0, 1).reshape(x.shape[1], -1).contiguous()


def _unfolded(tokens: Tensor, x: Tensor) -> Tensor:
    return tokens.unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)
