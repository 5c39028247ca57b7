"""Products of queries and keys in a chunk, decayed by what lies between them, without an exponential that overflows.

    A_ij = Σ_c q_ic k_jc exp(Σ_{j<t<=i} g_tc)      j <= i, else 0      g: log-decays, at most 0

As a matrix product this needs exp(G) on the queries and exp(-G) on the keys, G the sum of log-decays since the first
token. The latter grows, and a chunk that decays too much is treated otherwise. One log-decay for all channels: the
decays of pairs are multiplied after the product. One for each: the chunk is halved. A pair from different halves has
the boundary between its members, and from there neither factor exceeds 1; the pairs inside the halves are halved again
where need be, down to single tokens. Sums are taken anew in each half: a difference of large ones would lose the small
ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.recurrence.chunks import scaled

LARGEST_DECAY = 20.0
"""exp(20) = 5e8 leaves float32 room for the size of queries and keys, and sums up to 20 are rounded by 1e-6 at most."""


class Decays(NamedTuple):
    """The log-decays of chunks.

    Attributes:
        log: (..., C, 1) or (..., C, E), at most 0.
        since_first: their sums since the first token, whose own is left out; 0 in the first row.
    """

    log: Tensor
    since_first: Tensor

    @property
    def small(self) -> bool:
        """Whether no chunk decays too much for one product."""
        return bool((self.since_first[..., -1, :] >= -LARGEST_DECAY).all())

    def since_start(self) -> Tensor:
        """Factor by which what precedes a chunk has decayed at each token, (..., C, ·)."""
        return (self.since_first + self.log[..., :1, :]).exp()

    def until_end(self) -> Tensor:
        """Factor by which what each token writes has decayed at the end of the chunk, (..., C, ·)."""
        if self.small:
            return (self.since_first[..., -1:, :] - self.since_first).exp()
        return (self.log.flip(-2).cumsum(dim=-2).flip(-2) - self.log).exp()

    def of_pairs(self) -> Tensor:
        """Decay from token j to token i, (..., C, C), 0 for j > i; of one log-decay for all channels."""
        total = self.log.double().cumsum(dim=-2)  # a difference of large sums
        size = total.shape[-2]
        future = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
        return (total - total.mT).to(self.log.dtype).masked_fill(future, -torch.inf).exp()


def decays(log: Tensor) -> Decays:
    """The decays of chunks with these log-decays (..., C, ·)."""
    since_first = log.clone()
    since_first[..., 0, :] = 0
    return Decays(log, since_first.cumsum(dim=-2))


class Factors(NamedTuple):
    """What the tokens and matrices of a segment are multiplied by; None in all of them where nothing decays.

    Attributes:
        inside: the decays between the tokens of a chunk.
        since_start: (N, B, H, C, ·), see `Decays`.
        until_end: (N, B, H, C, ·), see `Decays`.
        of_chunk: (N, B, H, 1 or E, 1), of whole chunks.
    """

    inside: Decays | None
    since_start: Tensor | None
    until_end: Tensor | None
    of_chunk: Tensor | None


def factors(log: Tensor | None) -> Factors:
    """The factors of a segment with these log-decays (N, B, H, C, ·)."""
    if log is None:
        return Factors(None, None, None, None)
    inside = decays(log)
    since_start = inside.since_start()
    return Factors(inside, since_start, inside.until_end(), since_start[..., -1:, :].mT)


def decayed_pairs_by_definition(q: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
    """The definition, with a tensor of C * C * E numbers; log_decay: (..., C, ·), the rest as in `decayed_pairs`."""
    size = q.shape[-2]
    total = log_decay.cumsum(dim=-2)
    between = total[..., :, None, :] - total[..., None, :, :]
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    decay = between.masked_fill(future[..., None], -torch.inf).exp()
    keys = k[..., None, :, :] * decay
    return (q[..., :, None, :] * keys[..., None, :, :, :]).sum(dim=-1)


def decayed_pairs(q: Tensor, k: Tensor, decay: Decays | None) -> Tensor:
    """The pairs of every chunk.

    Args:
        q: (..., R, C, E), R kinds of queries, C a power of two.
        k: (..., C, E).
        decay: that of the chunks; None for none.

    Returns:
        (..., R, C, C), 0 above the diagonal.
    """
    if decay is None or decay.small:
        of_rows, of_columns = _factors(decay)
        return _product(scaled(q, of_rows), scaled(k, of_columns)).tril_()
    if decay.log.shape[-1] == 1:
        return _product(q, k) * decay.of_pairs()[..., None, :, :]
    half, q, k, decay = q.shape[-2] // 2, _halves(q).transpose(-4, -3), _halves(k), decays(_halves(decay.log))
    inside = decayed_pairs(q, k, decay)
    of_rows, of_columns = _crossing_factors(decay)
    pairs = inside.new_zeros((*inside.shape[:-4], inside.shape[-3], 2 * half, 2 * half))
    pairs[..., :half, :half], pairs[..., half:, half:] = inside.unbind(dim=-4)
    pairs[..., half:, :half] = _product(q.select(-4, 1) * of_rows, k.select(-3, 0) * of_columns)
    return pairs


def decayed_pairs_gradient(grad: Tensor, q: Tensor, k: Tensor, decay: Decays | None) -> tuple[Tensor, Tensor]:
    """Gradients of q and k for that of the pairs (..., R, C, C), which is 0 above the diagonal.

    That of the sum of log-decays up to a token is q · grad_q - k · grad_k, channel by channel; the caller takes it.
    """
    if decay is None or decay.small:
        of_rows, of_columns = _factors(decay)
        grad_q, grad_k = _product_gradients(grad, scaled(q, of_rows), scaled(k, of_columns))
        return scaled(grad_q, of_rows), scaled(grad_k, of_columns)
    if decay.log.shape[-1] == 1:
        return _product_gradients(grad * decay.of_pairs()[..., None, :, :], q, k)
    half, q, k, decay = q.shape[-2] // 2, _halves(q).transpose(-4, -3), _halves(k), decays(_halves(decay.log))
    inside = torch.stack((grad[..., :half, :half], grad[..., half:, half:]), dim=-4)
    grad_q, grad_k = decayed_pairs_gradient(inside, q, k, decay)
    of_rows, of_columns = _crossing_factors(decay)
    crossing_q, crossing_k = _product_gradients(
        grad[..., half:, :half], q.select(-4, 1) * of_rows, k.select(-3, 0) * of_columns
    )
    grad_q.select(-4, 1).add_(crossing_q * of_rows)
    grad_k.select(-3, 0).add_(crossing_k * of_columns)
    return grad_q.transpose(-4, -3).flatten(-3, -2), grad_k.flatten(-3, -2)


def _product(q: Tensor, k: Tensor) -> Tensor:
    """(..., R, C, E) by (..., C, E): (..., R, C, C), in one matrix product for each chunk."""
    return (q.flatten(-3, -2) @ k.mT).unflatten(-2, q.shape[-3:-1])


def _product_gradients(grad: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    rows = grad.flatten(-3, -2)
    return (rows @ k).unflatten(-2, q.shape[-3:-1]), rows.mT @ q.flatten(-3, -2)


def _factors(decay: Decays | None) -> tuple[Tensor | None, Tensor | None]:
    """Factors of queries and keys that meet at the first token."""
    if decay is None:
        return None, None
    of_rows = decay.since_first.exp()
    return of_rows[..., None, :, :], of_rows.reciprocal()


def _crossing_factors(decay: Decays) -> tuple[Tensor, Tensor]:
    """Factors of the queries of the second half and the keys of the first, which meet at the boundary."""
    return decay.since_start().select(-3, 1)[..., None, :, :], decay.until_end().select(-3, 0)


def _halves(x: Tensor) -> Tensor:
    """(..., C, E) -> (..., 2, C / 2, E)."""
    return x.unflatten(-2, (2, -1))
