"""Softmax attention of many rectangles with its log-sum-exp, forward and backward.

`scaled_dot_product_attention` hides the log-sum-exp, without which partial results can't be merged. The operator of the
CPU below it is private to torch; this module alone names it. It reads the channels of a token as neighbours in memory,
whatever their stride, which the public function checks and the operator doesn't: here channels that lie apart are
copied. On other devices products of matrices compute the same, with weights as large as the rectangles.
"""

from __future__ import annotations

import torch
from torch import Tensor

FUSED_ON = "cpu"
"""The type of device that has the operator."""
TALL_ROWS = 192
"""Rows of a rectangle from which on the operator takes 64 at a time, and runs faster; below 32."""


def fused_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Softmax attention of many independent rectangles.

    Args:
        q: (N, H, L, E), any strides; float32 or float64.
        k: (N, H, S, E), S at least 1.
        v: (N, H, S, E).
        scale: factor of the scores.
        bias: added to the scores, 0 or -inf, broadcastable to (N, H, L, S), the dtype of q.
        causal: row t sees the keys 0..t.

    Returns:
        out (N, H, L, E), by the operator laid out as (N, L, H, E); lse (N, H, L), 0, not -inf, in rows without any key.
    """
    if q.device.type != FUSED_ON:
        scores = _scores(q, k, scale, bias, causal)
        lse = scores.logsumexp(dim=-1)
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        return (scores - lse[..., None]).exp() @ v, lse
    q, k, v = (_beside(x) for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)


def fused_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `fused_forward`.

    With the result and the log-sum-exp of a softmax over more keys than these, the gradients are this part's share.

    Args:
        grad: (N, H, L, E), gradient of out.
        q: as in `fused_forward`.
        k: likewise.
        v: likewise.
        out: (N, H, L, E).
        lse: (N, H, L), finite.
        scale: likewise.
        bias: likewise.
        causal: likewise.

    Returns:
        Gradients of q, k and v, by the operator laid out as (N, L, H, E).
    """
    if q.device.type != FUSED_ON:
        weights = (_scores(q, k, scale, bias, causal) - lse[..., None]).exp()
        of_scores = scale * weights * (grad @ v.mT - (grad * out).sum(dim=-1, keepdim=True))
        return of_scores @ k, of_scores.mT @ q, weights.mT @ grad
    grad, q, k, v, out = (_beside(x) for x in (grad, q, k, v, out))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )


def lse_backward(
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k from a gradient of the log-sum-exp (N, H, L); the other arguments as in `fused_backward`.

    A gradient g of lse_i adds p_ij g to the gradient of s_ij. The fused operator computes p_ij (grad_i · v_j - grad_i ·
    out_i), which is that for values of 1 in the first channel, grad_i = g there, and out = 0.
    """
    values, grad = torch.zeros_like(k), torch.zeros_like(q)
    values[..., 0] = 1.0
    grad[..., 0] = grad_lse
    grad_q, grad_k, _ = fused_backward(grad, q, k, values, torch.zeros_like(q), lse, scale, bias, causal=causal)
    return grad_q, grad_k


def _scores(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, causal: bool) -> Tensor:
    scores = scale * (q @ k.mT)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(diagonal=1), -torch.inf)
    return scores if bias is None else scores + bias


def _beside(x: Tensor) -> Tensor:
    """The same numbers with the channels of a token beside each other."""
    return x if x.stride(-1) == 1 else x.contiguous()
