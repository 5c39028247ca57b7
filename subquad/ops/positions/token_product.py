"""One matrix that mixes the tokens of every channel alike.

y_i = Σ_j w_ij x_j        causal: j <= i
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.onednn import product, product_over_rows
from subquad.ops.precision import full_precision

BLOCK = 512
"""Tokens whose causal row of products runs at once: beside the visible pairs half a block is computed for each."""


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
            return _unfolded(visible_product(weights, tokens, causal=causal), x)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        weights, x = ctx.saved_tensors
        of_rows, of_weights = _folded(grad), None
        with full_precision(x.device):
            of_tokens = seeing_product(weights, of_rows, causal=ctx.causal)
            if ctx.needs_input_grad[0]:
                of_weights = outer_products(of_rows, _folded(x), causal=ctx.causal)
        return of_weights, _unfolded(of_tokens, x), None


def visible_product(weights: Tensor, tokens: Tensor, *, causal: bool) -> Tensor:
    """W X of (L, L) and (L, N), a row of it for the tokens that it sees: (L, N)."""
    if not causal:
        return product(weights, tokens.mT)
    blocks = _blocks(len(tokens))
    return torch.cat([product(weights[i, : i.stop].tril(i.start), tokens[: i.stop].mT) for i in blocks])


def seeing_product(weights: Tensor, rows: Tensor, *, causal: bool) -> Tensor:
    """Wᵀ Y of (L, L) and (L, N), a row of it for the tokens that see it: (L, N)."""
    if not causal:
        return product_over_rows(weights, rows)
    blocks = _blocks(len(rows))
    return torch.cat([product_over_rows(weights[i.start :, i].tril(), rows[i.start :]) for i in blocks])


def outer_products(rows: Tensor, tokens: Tensor, *, causal: bool) -> Tensor:
    """Y Xᵀ of (L, N) both, 0 where a token isn't seen: (L, L)."""
    if not causal:
        return product(rows, tokens)
    found = rows.new_zeros(len(rows), len(rows))
    for i in _blocks(len(rows)):
        found[i, : i.stop] = product(rows[i], tokens[: i.stop]).tril_(i.start)
    return found


def _blocks(length: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _folded(x: Tensor) -> Tensor:
    """(B, L, F) -> (L, B * F), contiguous."""
    return x.transpose(0, 1).reshape(x.shape[1], -1).contiguous()


def _unfolded(tokens: Tensor, x: Tensor) -> Tensor:
    return tokens.unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)
