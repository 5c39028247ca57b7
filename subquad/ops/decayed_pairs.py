"""Products of queries and keys in a chunk, decayed by what lies between them, without an exponential that overflows.

    A_ij = Σ_c q_ic k_jc exp(G_ic - G_jc)      j <= i, else 0      G: running sum of log-decays, falling along the chunk

As a matrix product this needs exp(G - G_r) on the queries and exp(G_r - G) on the keys for a reference r. With the
first token as reference the factor of the keys grows up to exp(spread), spread = G_first - G_last; so a chunk whose
spread is large is halved. A pair from different halves has the last token of the first half between its members, and
from there neither factor exceeds 1; the pairs inside the halves are halved again where need be, down to single tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_SPREAD = 40.0
"""exp(40) = 2e17 leaves float32 room for the size of queries and keys, and its rounding is below 3e-6."""


def decayed_pairs_by_definition(q: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """The definition, with a tensor of C * C * E numbers. Arguments and result as in `decayed_pairs`."""
    size = q.shape[-2]
    between = total[..., :, None, :] - total[..., None, :, :]
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    decay = between.masked_fill(future[..., None], -torch.inf).exp()
    return (q[..., :, None, :] * k[..., None, :, :] * decay).sum(dim=-1)


def decayed_pairs(q: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """The pairs of every chunk.

    Args:
        q: (..., C, E), C a power of two.
        k: (..., C, E).
        total: (..., C, 1) or (..., C, E), the running sums of log-decays in a chunk.

    Returns:
        (..., C, C), 0 above the diagonal.
    """
    if _fits(total):
        of_rows, of_columns = _factors(total)
        return ((q * of_rows) @ (k * of_columns).mT).tril_()
    (q, k, total), half = (_halves(tensor) for tensor in (q, k, total)), q.shape[-2] // 2
    inside = decayed_pairs(q, k, total)
    of_rows, of_columns = _crossing_factors(total)
    pairs = inside.new_zeros((*inside.shape[:-3], 2 * half, 2 * half))
    pairs[..., :half, :half], pairs[..., half:, half:] = inside.unbind(dim=-3)
    pairs[..., half:, :half] = (q.select(-3, 1) * of_rows) @ (k.select(-3, 0) * of_columns).mT
    return pairs


def decayed_pairs_gradient(grad: Tensor, q: Tensor, k: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of q and k for the gradient of the pairs (..., C, C), whose part above the diagonal is ignored.

    That of `total` is q · grad_q at a query less k · grad_k at a key, channel by channel; the caller sums it.
    """
    if _fits(total):
        of_rows, of_columns = _factors(total)
        grad = grad.tril()
        return (grad @ (k * of_columns)).mul_(of_rows), (grad.mT @ (q * of_rows)).mul_(of_columns)
    (q, k, total), half = (_halves(tensor) for tensor in (q, k, total)), q.shape[-2] // 2
    inside = torch.stack((grad[..., :half, :half], grad[..., half:, half:]), dim=-3)
    grad_q, grad_k = decayed_pairs_gradient(inside, q, k, total)
    of_rows, of_columns = _crossing_factors(total)
    crossing = grad[..., half:, :half]
    grad_q.select(-3, 1).add_((crossing @ (k.select(-3, 0) * of_columns)).mul_(of_rows))
    grad_k.select(-3, 0).add_((crossing.mT @ (q.select(-3, 1) * of_rows)).mul_(of_columns))
    return grad_q.flatten(-3, -2), grad_k.flatten(-3, -2)


def _fits(total: Tensor) -> bool:
    """Whether the spread of every chunk is small enough for one product."""
    return total.shape[-2] == 1 or bool((total[..., 0, :] - total[..., -1, :] <= LARGEST_SPREAD).all())


def _factors(total: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of queries and keys that meet at the first token."""
    of_rows = (total - total[..., :1, :]).exp()
    return of_rows, of_rows.reciprocal()


def _crossing_factors(total: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the queries of the second half and the keys of the first; total: (..., 2, C / 2, ·)."""
    first, second = total.unbind(dim=-3)
    between = first[..., -1:, :]
    return (second - between).exp(), (between - first).exp()


def _halves(x: Tensor) -> Tensor:
    """(..., C, E) -> (..., 2, C / 2, E)."""
    return x.unflatten(-2, (2, -1))
