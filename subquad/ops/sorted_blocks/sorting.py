"""Sorting blocks softly: a matrix, nearly a permutation, that says which blocks make up each sorted block.

    P = exp(R),  R = (s + g) / τ, then K times: R -= logsumexp over the row, R -= logsumexp over the column

With enough rounds P is doubly stochastic. Among causal blocks a row reaches earlier blocks only, and its columns are
normalised over the rows up to it: the sum over all rows, as published, would tell a row about blocks of the future.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN = -1e30
"""Logarithm of nothing: finite, so that a row without any entry has finite gradients."""


class BlockScores(NamedTuple):
    """What the scores s of blocks are made of: s_huv = weight_hv · hidden_u + bias_hv.

    They are kept as factors, since all scores together grow with the square of the number of blocks.

    Attributes:
        hidden: (B, N, F), what is known of each block.
        weight: (H, M, F), one row for each block that may be chosen, M at least N.
        bias: (H, M).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor

    def scores(self) -> Tensor:
        """All scores, (B, H, N, N), float32 or wider."""
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        hidden, weight, bias = (tensor.to(wide) for tensor in self)
        count = hidden.shape[1]
        return torch.einsum("bnf,hmf->bhnm", hidden, weight[:, :count]) + bias[None, :, None, :count]


class Sorting(NamedTuple):
    """How scores become a sorting matrix.

    Attributes:
        iterations: K.
        temperature: τ.
        causal: a block is sorted to later places only.
        noise_seed: of the Gumbel noise g; None for none.
    """

    iterations: int
    temperature: float
    causal: bool
    noise_seed: int | None = None


def block_descriptors(x: Tensor, block: int, *, causal: bool) -> Tensor:
    """What blocks are described by: the sums of their tokens, causal: of all tokens up to their first one.

    Args:
        x: (B, L, D), zeros at invalid tokens.
        block: tokens of a block.
        causal: let no token of a block but the first into its sum.

    Returns:
        (B, N, D) with N = ⌈L / block⌉, summed in float32 or wider and given in the dtype of x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if causal:
        return wide.cumsum(dim=1)[:, ::block].contiguous().to(x.dtype)  # a view would keep all the sums
    missing = -x.shape[1] % block
    return F.pad(wide, (0, 0, 0, missing)).unflatten(1, (-1, block)).sum(dim=2).to(x.dtype)


def sinkhorn(scores: Tensor, iterations: int, *, causal: bool = False) -> Tensor:
    """Normalise exp(scores) by rows and columns in turn.

    Args:
        scores: (..., N, N), rows are destinations; float32 or wider.
        iterations: times that rows and then columns are normalised.
        causal: keep entries strictly below the diagonal, and normalise a column over the rows up to each.

    Returns:
        The matrix (..., N, N); causal: 0 on and above the diagonal, row 0 altogether.
    """
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu() if causal else None

    def masked(logarithms: Tensor) -> Tensor:
        return logarithms if hidden is None else logarithms.masked_fill(hidden, HIDDEN)

    scores = masked(scores)
    for _ in range(iterations):
        scores = masked(scores - scores.logsumexp(dim=-1, keepdim=True))
        columns = scores.logcumsumexp(dim=-2) if causal else scores.logsumexp(dim=-2, keepdim=True)
        scores = masked(scores - columns)
    return scores.exp()


def sorting_matrices(blocks: BlockScores, sorting: Sorting, counts: list[int]) -> list[Tensor]:
    """The sorting matrix (H, n, n) of each example, of whose blocks the first n = counts[b] are sorted."""
    scores = blocks.scores()
    if sorting.noise_seed is not None:
        scores = scores + _gumbel(scores, sorting.noise_seed)
    scores = scores / sorting.temperature
    if all(count == scores.shape[2] for count in counts):
        return list(sinkhorn(scores, sorting.iterations, causal=sorting.causal))
    parts = (example[:, :count, :count] for example, count in zip(scores, counts, strict=True))
    return [sinkhorn(part, sorting.iterations, causal=sorting.causal) for part in parts]


def _gumbel(like: Tensor, seed: int) -> Tensor:
    """Standard Gumbel noise, a function of the seed, so that a recomputation finds it again."""
    generator = torch.Generator(like.device).manual_seed(seed)
    uniform = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    tiny = torch.finfo(like.dtype).tiny
    return -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()
