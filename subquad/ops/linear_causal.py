"""Causal linear attention in chunks, exact for every chunk size, going on from the sums of earlier tokens.

    o_i = φ(q_i)ᵀ S_i / (φ(q_i)ᵀ z_i + ε)        S_i = Σ_{j <= i} φ(k_j) v_jᵀ, z_i = Σ_{j <= i} φ(k_j)

Inside a chunk pairs are summed directly; what lies before it is read from the sums up to the chunk, which are prefix
sums of the chunks' own: one product with a triangular matrix. A segment of `SEGMENT_CHUNKS` chunks runs at a time.

Features that are exponentials are kept relative to exp(c_i), with c_i the largest exponent among the keys j <= i. A
query never meets a maximum that a later key has raised: what key j left at its own c_j is brought to row i by the
factor exp(c_j - c_i) <= 1, in the pairs of a chunk, in the prefix sums and in what is carried from call to call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.feature_maps import FeatureMap
from subquad.ops.linear_sums import Sums, gradients_of_division, lowest, no_sums, result_like
from subquad.ops.precision import full_precision
from subquad.ops.slices import Heads, head_groups

CHUNK = 64
"""Tokens per chunk; the result doesn't depend on it."""

SEGMENT_CHUNKS = 32
"""Chunks that run at a time."""


class Settings(NamedTuple):
    """How causal sums run.

    Attributes:
        feature_map: φ.
        epsilon: added to the denominators; None for no division.
        chunk: tokens per chunk; speed only.
    """

    feature_map: FeatureMap
    epsilon: float | None
    chunk: int


def causal_sums(
    q: Tensor, k: Tensor, v: Tensor, before: Sums | None, settings: Settings, valid: Tensor | None = None
) -> tuple[Tensor, Sums]:
    """Causal linear attention.

    Args:
        q: (B, H, L, E), any floating dtype.
        k: (B, H, L, E).
        v: (B, H, L, Ev).
        before: the sums over all earlier tokens, None for none.
        settings: feature map, division and chunk.
        valid: bool (B, L), True for the keys that count.

    Returns:
        The result (B, H, L, Ev), the dtype of q, and the sums over everything seen so far.
    """
    before = no_sums(k, v, settings.feature_map) if before is None else before
    out, *after = _CausalSums.apply(q, k, v, *before, valid, settings)  # pyright: ignore[reportGeneralTypeIssues] - apply has no types
    return out, Sums(*after)


def segments(length: int, chunk: int) -> Iterator[tuple[slice, int]]:
    """Segments of whole chunks, each with its number of chunks; what is left over is one shorter chunk."""
    whole = length - length % chunk
    for start in range(0, whole, SEGMENT_CHUNKS * chunk):
        stop = min(start + SEGMENT_CHUNKS * chunk, whole)
        yield slice(start, stop), (stop - start) // chunk
    if whole < length:
        yield slice(whole, length), 1


class _Factors(NamedTuple):
    """What brings sums from the reference of their key to that of a row; all at most 1.

    Attributes:
        pairs: (G N or 1, C, C), lower triangular: row i from key j of the same chunk.
        read: (G N, C, 1), row i from the sums before its chunk; None for 1.
        write: (G N, C, 1), from key j to the sums after its chunk; None for 1.
        across: (G or 1, N + 1, N + 1), lower triangular: the sums before chunk n, and after the last, from what
            was carried into the segment (m = 0) or written by chunk m - 1.
    """

    pairs: Tensor
    read: Tensor | None
    write: Tensor | None
    across: Tensor


def _plain_factors(like: Tensor, chunks: int, size: int) -> _Factors:
    pairs, across = (like.new_ones(1, n, n).tril_() for n in (size, chunks + 1))
    return _Factors(pairs, None, None, across)


def _factors(references: Tensor, before: Tensor, chunks: int) -> _Factors:
    """Factors from the reference of each token (G, T) and that of what was carried in (G, 1)."""
    own = references.unflatten(1, (chunks, -1))  # (G, N, C)
    ends = torch.cat((before, own[..., -1]), dim=1)  # (G, N + 1)
    read, write = (ends[:, :-1, None] - own).exp_(), (own - ends[:, 1:, None]).exp_()
    pairs, across = ((rows[..., None, :] - rows[..., :, None]).exp_().tril_() for rows in (own, ends))
    return _Factors(pairs.flatten(0, 1), *(factor.flatten(0, 1)[..., None] for factor in (read, write)), across)


class _Segment(NamedTuple):
    """A segment of some heads, made again in the backward pass: N chunks of C tokens in each of G heads.

    Attributes:
        q_rows: (G, T, E).
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
    factors: _Factors
    references: Tensor | None

    @property
    def written(self) -> Tensor:
        """Values as they go into the sums, (G N, C, Ev)."""
        return self.v if self.factors.write is None else self.v * self.factors.write

    @property
    def own_features(self) -> Tensor:
        """What each chunk adds to the sums of features, (G N, F, 1)."""
        write = self.factors.write
        return self.k.sum(dim=1)[..., None] if write is None else self.k.mT @ write

    def weights(self) -> Tensor:
        """Of the pairs inside chunks, (G N, C, C)."""
        return (self.q @ self.k.mT).mul_(self.factors.pairs)

    def prefix(self, before: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Sums before each chunk (G N, ...) and after the last (G, ...), from those before the first and the own."""
        groups, shape = before.shape[0], before.shape[1:]
        written = torch.cat((before[:, None], own.unflatten(0, (groups, -1))), dim=1).flatten(2)
        across = self.factors.across.expand(groups, -1, -1)
        return (across[:, :-1] @ written).view(-1, *shape), (across[:, -1:] @ written).view(groups, *shape)

    def suffix(self, read: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the sums before the first chunk (G, ...) and of the own (G N, ...); inverse of `prefix`."""
        groups, shape = after.shape[0], after.shape[1:]
        rows = torch.cat((read.unflatten(0, (groups, -1)), after[:, None]), dim=1).flatten(2)
        across = self.factors.across.expand(groups, -1, -1).mT
        return (across[:, :1] @ rows).view(groups, *shape), (across[:, 1:] @ rows).view(-1, *shape)


def _make_segment(
    group: Heads,
    tokens: slice,
    chunks: int,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    feature_map: FeatureMap,
    before: Tensor | None,
) -> _Segment:
    """The segment of these tokens of q, k, v with facts about them; `before` is the reference carried in, (G, 1)."""
    q, k, v, valid = inputs
    dtype = torch.promote_types(q.dtype, torch.float32)
    hidden = None if valid is None else group.hidden(valid, tokens)
    q_rows, k_rows = group.take(q, dtype, tokens), group.take(k, dtype, tokens, hidden)
    part_v = group.take(v, dtype, tokens, hidden)
    prepared, references = feature_map.prepare(k_rows), None
    if before is not None and prepared.peak is not None:
        peak = prepared.peak if hidden is None else prepared.peak.masked_fill(hidden, lowest(dtype))
        references = torch.maximum(peak[..., 0].cummax(dim=1).values, before)
    mapped = feature_map.finish(prepared, None if references is None else references[..., None])
    mapped = mapped if hidden is None else mapped.masked_fill(hidden, 0.0)
    if references is None or before is None:
        factors = _plain_factors(mapped, chunks, mapped.shape[1] // chunks)
    else:
        factors = _factors(references, before, chunks)
    in_chunks = (_in_chunks(x, chunks) for x in (part_v, feature_map.queries(q_rows), mapped))
    return _Segment(q_rows, k_rows, *in_chunks, factors, references)


def _in_chunks(x: Tensor, chunks: int) -> Tensor:
    """(G, N C, E) -> (G N, C, E); a view where one is possible."""
    return x.unflatten(1, (chunks, -1)).flatten(0, 1)


def _whole(x: Tensor, groups: int) -> Tensor:
    """(G N, C, E) -> (G, N C, E)."""
    return x.view(groups, -1, x.shape[-1])


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


class _CausalSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        values: Tensor,
        features: Tensor,
        reference: Tensor | None,
        valid: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        values, features = values.clone(), features.clone()
        reference = None if reference is None else reference.clamp_min(lowest(values.dtype))
        first_reference = reference
        reference = None if reference is None else reference.clone()
        parts = list(segments(q.shape[2], settings.chunk))
        carried_values = values.new_empty(len(parts), *values.shape)
        carried_features = features.new_empty(len(parts), *features.shape)
        out, everything = result_like(q, v.shape[-1]), slice(None)
        total = None if settings.epsilon is None else values.new_empty(q.shape[:3])
        references = None if reference is None else values.new_empty(q.shape[:3])
        with full_precision(q.device):
            for group in head_groups(q):
                own_values, own_features = values[group].flatten(0, 1), features[group].flatten(0, 1)[..., None]
                before = None if reference is None else reference[group].reshape(-1, 1)
                for index, (tokens, chunks) in enumerate(parts):
                    group.put(carried_values[index], own_values)
                    group.put(carried_features[index], own_features[..., 0])
                    part = _make_segment(group, tokens, chunks, (q, k, v, valid), settings.feature_map, before)
                    before_values, own_values = part.prefix(own_values, part.k.mT @ part.written)
                    before_features, own_features = part.prefix(own_features, part.own_features)
                    mixed = _scaled(part.q @ before_values, part.factors.read)
                    weights = part.weights()
                    mixed = torch.baddbmm(mixed, weights, part.v, out=mixed)
                    if total is not None and settings.epsilon is not None:
                        weight = _scaled(part.q @ before_features, part.factors.read)
                        weight = weight.add_(weights.sum(dim=-1, keepdim=True)).add_(settings.epsilon)
                        group.put(total, weight, tokens)
                        mixed.div_(weight)
                    group.put(out, mixed, tokens)
                    if references is not None and part.references is not None:
                        group.put(references, part.references, tokens)
                        before = part.references[:, -1:]
                group.put(values, own_values)
                group.put(features, own_features)
                if reference is not None and before is not None:
                    group.put(reference, before)
        kept = (q, k, v, valid, None if total is None else out, total, references, first_reference)
        ctx.save_for_backward(*kept, carried_values, carried_features)
        ctx.settings = settings
        if reference is not None:
            ctx.mark_non_differentiable(reference)
        return out, values, features, reference

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor, grad_values: Tensor, grad_features: Tensor, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *inputs, out, total, references, first_reference, carried_values, carried_features = ctx.saved_tensors
        q, k, v, valid = inputs
        settings: Settings = ctx.settings
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        grad_values, grad_features = grad_values.clone(), grad_features.clone()
        parts = list(enumerate(segments(q.shape[2], settings.chunk)))
        with full_precision(q.device):
            for group in head_groups(q):
                of_after = grad_values[group].flatten(0, 1)
                of_features_after = grad_features[group].flatten(0, 1)[..., None]
                for index, (tokens, chunks) in reversed(parts):
                    before = None
                    if first_reference is not None:
                        at = first_reference if tokens.start == 0 else references[:, :, tokens.start - 1]
                        before = at[group].reshape(-1, 1)
                    part = _make_segment(group, tokens, chunks, (q, k, v, valid), settings.feature_map, before)
                    groups = part.q_rows.shape[0]
                    read, write = part.factors.read, part.factors.write
                    written = part.written
                    before_values, _ = part.prefix(carried_values[index][group].flatten(0, 1), part.k.mT @ written)
                    of_mixed, of_total = group.take(grad, part.q.dtype, tokens), None
                    if total is not None:
                        of_mixed, of_total = gradients_of_division(group, tokens, of_mixed, out, total)
                        of_total = _in_chunks(of_total, chunks)
                    of_mixed = _in_chunks(of_mixed, chunks)
                    of_weights = of_mixed @ part.v.mT
                    if of_total is not None:
                        of_weights.add_(of_total)
                    of_weights.mul_(part.factors.pairs)
                    weights = part.weights()
                    of_read = _scaled(of_mixed, read)
                    of_q = torch.baddbmm(of_weights @ part.k, of_read, before_values.mT)
                    of_before = part.q.mT @ of_read
                    of_after, of_written = part.suffix(of_before, of_after)
                    of_k = torch.baddbmm(of_weights.mT @ part.q, written, of_written.mT)
                    of_v = (weights.mT @ of_mixed).add_(_scaled(part.k @ of_written, write))
                    if of_total is not None:
                        before_features, _ = part.prefix(
                            carried_features[index][group].flatten(0, 1)[..., None], part.own_features
                        )
                        of_read_total = _scaled(of_total, read)
                        of_q.addcmul_(of_read_total, before_features.mT)
                        of_features_after, of_own = part.suffix(part.q.mT @ of_read_total, of_features_after)
                    else:
                        zero = part.q.new_zeros(part.q.shape[0], part.q.shape[2], 1)
                        of_features_after, of_own = part.suffix(zero, of_features_after)
                    if write is None:
                        of_k.add_(of_own.mT)
                    else:
                        of_k.addcmul_(write, of_own.mT)
                    of_k = _whole(of_k, groups)
                    if valid is not None:
                        of_k.masked_fill_(group.hidden(valid, tokens), 0.0)
                    group.put(grad_v, _whole(of_v, groups), tokens)
                    of_q = settings.feature_map.gradient(
                        part.q_rows, _whole(part.q, groups), _whole(of_q, groups), keys=False
                    )
                    group.put(grad_q, of_q, tokens)
                    of_k = settings.feature_map.gradient(part.k_rows, _whole(part.k, groups), of_k, keys=True)
                    group.put(grad_k, of_k, tokens)
                group.put(grad_values, of_after)
                group.put(grad_features, of_features_after)
        return grad_q, grad_k, grad_v, grad_values, grad_features, None, None, None
