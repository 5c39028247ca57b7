"""Sorting blocks softly: a matrix, nearly a permutation, that says which blocks make up each sorted block.

    P = exp(R),  R = (s + g) / τ, then K times: R -= logsumexp over the row, R -= logsumexp over the column

With enough rounds P is doubly stochastic. Among causal blocks a row reaches earlier blocks only, and its columns are
normalised over the rows up to it: the sum over all rows, as published, would tell a row about blocks of the future.
A stream goes on with the logarithms of its columns' sums alone, one for each iteration.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.precision import wide_dtype

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

    def scores(self, columns: int | None = None) -> Tensor:
        """All scores, (B, H, N, N), or those of the first blocks that may be chosen, (B, H, N, columns); float32 up."""
        wide = wide_dtype(self.hidden)
        hidden, weight, bias = (tensor.to(wide) for tensor in self)
        count = hidden.shape[1] if columns is None else columns
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
    wide = x.to(wide_dtype(x))
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


def later_rows(scores: Tensor, numbers: Tensor, opened: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of causal sorting matrices that follow on earlier ones.

    Args:
        scores: (B, H, R, N), of blocks that follow on each other, over the temperature; float32 or wider.
        numbers: int64 (B, R), which blocks they are.
        opened: int64 (B,), how many blocks of each example there are; rows of later ones count for nothing.
        sums: (B, H, K, T), logarithms of the sums of the columns over the earlier rows, after the normalisation of the
            rows in each iteration; T at most N. Columns without an entry may hold anything finite.

    Returns:
        The rows (B, H, R, N), and the sums over all rows, (B, H, K, max(opened) - 1), 0 in columns without an entry.
    """
    columns = torch.arange(scores.shape[3], device=scores.device)
    before = numbers[:, 0] if numbers.shape[1] else opened
    without = (columns >= (before - 1)[:, None])[:, None]
    hidden = ((columns >= numbers[..., None]) | (numbers >= opened[:, None])[..., None])[:, None]
    sums = F.pad(sums.to(scores.dtype), (0, len(columns) - sums.shape[3]))
    scores, after = scores.masked_fill(hidden, HIDDEN), []
    for earlier in sums.unbind(dim=2):
        scores = (scores - scores.logsumexp(dim=-1, keepdim=True)).masked_fill(hidden, HIDDEN)
        earlier = earlier.masked_fill(without, HIDDEN)[:, :, None]
        running = torch.cat((earlier, scores), dim=2).logcumsumexp(dim=2)
        scores = (scores - running[:, :, 1:]).masked_fill(hidden, HIDDEN)
        after.append(running[:, :, -1])
    left = torch.stack(after, dim=2) if after else sums
    left = left.masked_fill((columns >= (opened - 1)[:, None])[:, None, None], 0.0)
    return scores.exp(), left[..., : max([0, *(opened - 1).tolist()])]


def sorting_logits(blocks: BlockScores, sorting: Sorting, columns: int | None = None) -> Tensor:
    """(s + g) / τ, as `BlockScores.scores` gives s."""
    scores = blocks.scores(columns)
    if sorting.noise_seed is not None:
        scores = scores + _gumbel(scores, sorting.noise_seed)
    return scores / sorting.temperature


def sorting_matrices(blocks: BlockScores, sorting: Sorting, counts: list[int]) -> list[Tensor]:
    """The sorting matrix (H, n, n) of each example, of whose blocks the first n = counts[b] are sorted."""
    scores = sorting_logits(blocks, sorting)
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
