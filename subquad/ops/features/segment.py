"""A segment of causal linear attention: N chunks of C tokens in each of G heads, and what passes between the chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.features.maps import FeatureMap
from subquad.ops.features.slices import Heads
from subquad.ops.features.sums import lowest


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


class Factors(NamedTuple):
    """What brings sums from the reference of their key to that of a row; all at most 1.

    Attributes:
        pairs: (G N or 1, C, C), lower triangular: row i from key j of the same chunk.
        read: (G N, C, 1), row i from the sums before its chunk; None for 1.
        write: (G N, C, 1), from key j to the sums after its chunk; None for 1.
        across: (G or 1, N + 1, N + 1), lower triangular: the sums before chunk n, and in the last row after all, from
            what was carried into the segment (column 0) or written by chunk m - 1.
    """

    pairs: Tensor
    read: Tensor | None
    write: Tensor | None
    across: Tensor


def _reference_factors(references: Tensor, before: Tensor, chunks: int) -> Factors:
    """Factors from the reference of each token (G, T) and that of what was carried in (G, 1)."""
    own = references.unflatten(1, (chunks, -1))  # (G, N, C)
    ends = torch.cat((before, own[..., -1]), dim=1)  # (G, N + 1)
    pairs, across = ((rows[..., None, :] - rows[..., :, None]).exp_().tril_() for rows in (own, ends))
    read, write = (ends[:, :-1, None] - own).exp_(), (own - ends[:, 1:, None]).exp_()
    read, write = read.flatten(0, 1)[..., None], write.flatten(0, 1)[..., None]
    return Factors(pairs.flatten(0, 1), read, write, across)


class Segment(NamedTuple):
    """Features and factors of a segment; made again in the backward pass.

    Attributes:
        q_rows: (G, T, E), T = N C.
        k_rows: (G, T, E).
        v: (G N, C, Ev).
        q: features, (G N, C, F).
        k: features relative to the references of their tokens, (G N, C, F).
        factors: between references.
        references: of each token, (G, T); None for features without exponents.
    """

    q_rows: Tensor
    k_rows: Tensor
    v: Tensor
    q: Tensor
    k: Tensor
    factors: Factors
    references: Tensor | None

    @property
    def groups(self) -> int:
        """G."""
        return self.q_rows.shape[0]

    @property
    def chunks(self) -> int:
        """N."""
        return self.q.shape[0] // self.groups

    def weights(self) -> Tensor:
        """Of the pairs inside chunks, (G N, C, C)."""
        return (self.q @ self.k.mT).mul_(self.factors.pairs)

    def written_values(self) -> Tensor:
        """Values as they go into the sums, (G N, C, Ev)."""
        return scaled(self.v, self.factors.write)

    def prefix_values(self, before: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of values before each chunk (G N, F, Ev), and after the last (G, F, Ev)."""
        return self._prefix(before, self.k.mT @ written)

    def prefix_features(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of features before each chunk (G N, 1, F), and after the last (G, F)."""
        before_chunks, after = self._prefix(before, scaled(self.k, self.factors.write).sum(dim=1))
        return before_chunks[:, None], after

    def suffix_values(self, of_read: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """The way back of `prefix_values`.

        Args:
            of_read: gradient of what rows read, at the reference of the sums before their chunk, (G N, C, Ev).
            after: gradient of the sums after the last chunk, (G, F, Ev).

        Returns:
            Gradients of the sums carried in (G, F, Ev) and of what each chunk wrote (G N, F, Ev).
        """
        return self._suffix(self.q.mT @ of_read, after)

    def suffix_features(self, of_total: Tensor | None, after: Tensor) -> tuple[Tensor, Tensor]:
        """The way back of `prefix_features`, (G, F) and (G N, 1, F), from the gradient of denominators (G N, C, 1)."""
        own = self.q.new_zeros(self.q.shape[0], 1, after.shape[1]) if of_total is None else of_total.mT @ self.q
        of_before, of_own = self._suffix(own[:, 0], after)
        return of_before, of_own[:, None]

    def _prefix(self, before: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Running sums of what was carried in (G, ...) and of the chunks (G N, ...): before each, and after all."""
        across, shape = self.factors.across.expand(self.groups, -1, -1), own.shape
        carried, own = before.flatten(1), own.view(self.groups, self.chunks, -1)
        sums = (across[:, :-1, 1:] @ own).addcmul_(across[:, :-1, :1], carried[:, None])
        after = torch.addcmul(own[:, -1], across[:, -1:, -2], sums[:, -1])
        return sums.view(shape), after.view(before.shape)

    def _suffix(self, own: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Sums from the other end: of what was carried in, and of what each chunk wrote."""
        across, shape = self.factors.across.expand(self.groups, -1, -1).mT, own.shape
        carried, own = after.flatten(1), own.view(self.groups, self.chunks, -1)
        sums = (across[:, 1:, :-1] @ own).addcmul_(across[:, 1:, -1:], carried[:, None])
        before = torch.addcmul(own[:, 0], across[:, :1, 1], sums[:, 0])
        return before.view(after.shape), sums.view(shape)


def make_segment(
    group: Heads, tokens: slice, chunks: int, inputs: Inputs, feature_map: FeatureMap, before: Tensor | None
) -> Segment:
    """The segment of these tokens; `before` is the reference that is carried in, (G, 1)."""
    q, k, v, valid = inputs
    dtype = torch.promote_types(v.dtype, torch.float32)
    hidden = None if valid is None else group.hidden(valid, tokens)
    q_rows, k_rows = group.take(q, dtype, tokens), group.take(k, dtype, tokens, hidden)
    prepared, references = feature_map.prepare(k_rows), None
    if before is not None and prepared.peak is not None:
        peak = prepared.peak if hidden is None else prepared.peak.masked_fill(hidden, lowest(dtype))
        references = torch.maximum(peak[..., 0].cummax(dim=1).values, before)
    mapped = feature_map.finish(prepared, None if references is None else references[..., None])
    mapped = mapped if hidden is None else mapped.masked_fill(hidden, 0.0)
    if references is None or before is None:
        size = mapped.shape[1] // chunks
        pairs, across = (mapped.new_ones(1, n, n).tril_() for n in (size, chunks + 1))
        factors = Factors(pairs, None, None, across)
    else:
        factors = _reference_factors(references, before, chunks)
    part_v, part_q = group.take(v, dtype, tokens, hidden), feature_map.queries(q_rows)
    part_v, part_q, part_k = (in_chunks(part, chunks) for part in (part_v, part_q, mapped))
    return Segment(q_rows, k_rows, part_v, part_q, part_k, factors, references)


def in_chunks(x: Tensor, chunks: int) -> Tensor:
    """(G, N C, E) -> (G N, C, E); a view where one is possible."""
    return x.unflatten(1, (chunks, -1)).flatten(0, 1)


def whole(x: Tensor, groups: int) -> Tensor:
    """(G N, C, E) -> (G, N C, E)."""
    return x.reshape(groups, -1, x.shape[-1])


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    """X times the factor, where there is one."""
    return x if factor is None else x * factor
