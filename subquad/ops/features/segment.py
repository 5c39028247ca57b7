"""A segment of causal linear attention: N chunks of C tokens in some heads, and what passes between the chunks.

Chunks come first, (N, B, H, C, E), so that a step from one to the next takes all heads together. A column of ones is
joined to the values, so that every sum of them brings its denominator: W = Ev + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.chunk_products import multiply
from subquad.ops.features.maps import FeatureMap
from subquad.ops.features.slices import HeadGroup, Workspace
from subquad.ops.features.sums import lowest
from subquad.ops.precision import wide_dtype


class Inputs(NamedTuple):
    """What the segments are cut from.

    Attributes:
        q: (B, H, L, E).
        k: (B, H, L, E).
        v: (B, H, L, Ev).
        valid: bool (B, L), True for the keys that count; None for all.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor | None


class Place(NamedTuple):
    """Where a segment lies.

    Attributes:
        group: its heads.
        tokens: T = N C tokens.
        chunks: N.
    """

    group: HeadGroup
    tokens: slice
    chunks: int

    def of(self, x: Tensor) -> Tensor:
        """This part of x (B, H, L, ...), a view (N, B', H', C, ...)."""
        return self.group.chunks(x, self.tokens, self.chunks)

    def hidden(self, valid: Tensor) -> Tensor:
        """Which keys don't count, bool (N, B', 1, C, 1), from those that do, (B, L)."""
        hidden = self.group.hidden(valid, self.tokens)
        return hidden.unflatten(2, (self.chunks, -1)).movedim(2, 0)


class Factors(NamedTuple):
    """What brings sums from the reference of their key to that of a row; all at most 1.

    Attributes:
        pairs: (N, B, H, C, C), lower triangular: row i from key j of the same chunk.
        read: (N, B, H, C, 1), row i from the sums before its chunk.
        write: (N, B, H, C, 1), from key j to the sums after its chunk.
        across: (N, B, H, 1, 1), from the sums before a chunk to those after it.
    """

    pairs: Tensor
    read: Tensor
    write: Tensor
    across: Tensor


def _factors(references: Tensor, before: Tensor) -> Factors:
    """Factors from the reference of each token (N, B, H, C) and that of what was carried in (B, H)."""
    ends = torch.cat((before[None], references[..., -1]))  # (N + 1, B, H)
    pairs = (references[..., None, :] - references[..., :, None]).exp_().tril_()
    read, write = (ends[:-1, ..., None] - references).exp_(), (references - ends[1:, ..., None]).exp_()
    return Factors(pairs, read[..., None], write[..., None], (ends[:-1] - ends[1:]).exp_()[..., None, None])


class Segment(NamedTuple):
    """Features and factors of a segment; made again in the backward pass.

    Attributes:
        q_rows: (N, B, H, C, E).
        k_rows: (N, B, H, C, E).
        q: features, (N, B, H, C, F).
        k: features relative to the references of their tokens, (N, B, H, C, F).
        v: (N, B, H, C, W).
        factors: between references; None where all are 1.
        references: of each token, (N, B, H, C); None for features without exponents.
        workspace: memory for what is made of them.
    """

    q_rows: Tensor
    k_rows: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    factors: Factors | None
    references: Tensor | None
    workspace: Workspace

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """The products a b of (N, B, H, ·, ·), in the memory of this name."""
        return multiply(a, b, self.workspace.of(name, *a.shape[:-1], b.shape[-1]))

    def below(self, pairs: Tensor) -> Tensor:
        """Pairs (N, B, H, C, C) times their factors, in place; 0 for a key behind its row."""
        return pairs.tril_() if self.factors is None else pairs.mul_(self.factors.pairs)

    def weights(self) -> Tensor:
        """Of the pairs inside chunks, (N, B, H, C, C)."""
        return self.below(self.product("weights", self.q, self.k.mT))

    def read(self, x: Tensor) -> Tensor:
        """Rows x (N, B, H, C, ·) as they are read from, or as gradients go to, the sums before the chunk."""
        return x if self.factors is None else x * self.factors.read

    def written(self) -> Tensor:
        """Values as they go into the sums, (N, B, H, C, W)."""
        return self.v if self.factors is None else self.v * self.factors.write

    def sums(self, before: Tensor, written: Tensor) -> Tensor:
        """Running sums (N + 1, B, H, F, W): before each chunk, and after the last.

        Args:
            before: the sums carried in, (B, H, F, W).
            written: (N, B, H, C, W).
        """
        sums = self._matrices("sums")
        sums[0] = before
        multiply(self.k.mT, written, sums[1:])
        for i in range(len(sums) - 1):
            self._carry(sums[i], i, sums[i + 1])
        return sums

    def of_sums(self, of_read: Tensor, after: Tensor) -> Tensor:
        """The way back: gradients of the running sums, (N + 1, B, H, F, W).

        Args:
            of_read: gradient of what rows read, at the reference of the sums before their chunk, (N, B, H, C, W).
            after: gradient of the sums after the last chunk, (B, H, F, W).
        """
        gradients = self._matrices("gradients of sums")
        gradients[-1] = after
        multiply(self.q.mT, of_read, gradients[:-1])
        for i in reversed(range(len(gradients) - 1)):
            self._carry(gradients[i + 1], i, gradients[i])
        return gradients

    def _matrices(self, name: str) -> Tensor:
        chunks, batch, heads = self.k.shape[:3]
        return self.workspace.of(name, chunks + 1, batch, heads, self.k.shape[-1], self.v.shape[-1])

    def _carry(self, matrix: Tensor, chunk: int, target: Tensor) -> None:
        """Add a matrix to the one on the other side of a chunk."""
        if self.factors is None:
            target.add_(matrix)
        else:
            target.addcmul_(matrix, self.factors.across[chunk])


def make_segment(
    place: Place, inputs: Inputs, feature_map: FeatureMap, before: Tensor | None, workspace: Workspace
) -> Segment:
    """The segment of this place; `before` is the reference that is carried in, (B, H)."""
    dtype = wide_dtype(inputs.v)
    q_rows, k_rows, v_rows = (place.of(x).to(dtype) for x in inputs[:3])
    hidden = None if inputs.valid is None else place.hidden(inputs.valid)
    shape = *q_rows.shape[:-1], feature_map.count(q_rows.shape[-1])
    prepared, references = feature_map.prepare(k_rows, workspace.of("k", *shape)), None
    if before is not None and prepared.peak is not None:
        peak = prepared.peak if hidden is None else prepared.peak.masked_fill(hidden, lowest(dtype))
        by_tokens = peak[..., 0].movedim(0, 2)
        running = torch.maximum(by_tokens.flatten(2).cummax(dim=2).values, before[..., None])
        references = running.view(by_tokens.shape).movedim(2, 0)
    k = feature_map.finish(prepared, None if references is None else references[..., None])
    v = workspace.of("v", *v_rows.shape[:-1], v_rows.shape[-1] + 1)
    v[..., :-1], v[..., -1] = v_rows, 1.0
    if hidden is not None:
        k = k.masked_fill(hidden, 0.0)
        v.masked_fill_(hidden, 0.0)
    q = feature_map.queries(q_rows, workspace.of("q", *shape))
    factors = None if references is None or before is None else _factors(references, before)
    return Segment(q_rows, k_rows, q, k, v, factors, references, workspace)
