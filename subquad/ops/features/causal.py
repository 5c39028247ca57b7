"""Causal linear attention in chunks, exact for every chunk size, going on from the sums of earlier tokens.

    o_i = φ(q_i)ᵀ S_i / (φ(q_i)ᵀ z_i + ε)        S_i = Σ_{j <= i} φ(k_j) v_jᵀ, z_i = Σ_{j <= i} φ(k_j)

Inside a chunk pairs are summed directly; what lies before it is read from the sums up to the chunk, running sums of the
chunks' own. A segment of `SEGMENT_CHUNKS` chunks runs at a time.

Features that are exponentials are kept relative to exp(c_i), with c_i the largest exponent among the keys j <= i. A
query never meets a maximum that a later key has raised: what key j left at its own c_j is brought to row i by the
factor exp(c_j - c_i) <= 1, in the pairs of a chunk, in the prefix sums and in what is carried from call to call.

Autograd keeps q, k, v, the result with its denominators and references, and the sums before each segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.features.maps import FeatureMap
from subquad.ops.features.segment import Inputs, Segment, in_chunks, make_segment, scaled, whole
from subquad.ops.features.slices import Heads, head_groups
from subquad.ops.features.sums import Sums, gradients_of_division, lowest, no_sums, result_like
from subquad.ops.precision import full_precision

CHUNK = 64
"""Tokens per chunk; the result doesn't depend on it."""

SEGMENT_CHUNKS = 16
"""Chunks that run at a time."""

SEGMENT_HEADS = 2
"""Heads that run at a time, at least."""


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
    whole_chunks = length - length % chunk
    for start in range(0, whole_chunks, SEGMENT_CHUNKS * chunk):
        stop = min(start + SEGMENT_CHUNKS * chunk, whole_chunks)
        yield slice(start, stop), (stop - start) // chunk
    if whole_chunks < length:
        yield slice(whole_chunks, length), 1


class _Kept(NamedTuple):
    """What autograd keeps.

    Attributes:
        q: (B, H, L, E).
        k: (B, H, L, E).
        v: (B, H, L, Ev).
        valid: bool (B, L).
        out: the result, (B, H, L, Ev); None without division.
        total: its denominators, (B, H, L).
        references: of each token, (B, H, L); None for features without exponents.
        first_reference: of what came before, (B, H).
        values: sums before each segment, (segments, B, H, F, Ev).
        features: likewise, (segments, B, H, F).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor | None
    out: Tensor | None
    total: Tensor | None
    references: Tensor | None
    first_reference: Tensor | None
    values: Tensor
    features: Tensor

    def inputs(self) -> Inputs:
        """What segments are made of."""
        return Inputs(self.q, self.k, self.v, self.valid)

    def reference_before(self, group: Heads, tokens: slice) -> Tensor | None:
        """The reference carried into a segment, (G, 1)."""
        if self.references is None or self.first_reference is None:
            return None
        at = self.references[:, :, tokens.start - 1] if tokens.start else self.first_reference
        return at[group].reshape(-1, 1)


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
        parts, feature_map = list(segments(q.shape[2], settings.chunk)), settings.feature_map
        out, divided = result_like(q, v.shape[-1]), settings.epsilon is not None
        kept = _Kept(
            q,
            k,
            v,
            valid,
            out if divided else None,
            values.new_empty(q.shape[:3]) if divided else None,
            None if reference is None else values.new_empty(q.shape[:3]),
            None if reference is None else reference.clamp_min(lowest(values.dtype)),
            values.new_empty(len(parts), *values.shape),
            features.new_empty(len(parts), *features.shape),
        )
        after = torch.empty_like(values), torch.empty_like(features)
        with full_precision(q.device):
            for group in head_groups(q, SEGMENT_HEADS):
                own = values[group].flatten(0, 1), features[group].flatten(0, 1)
                for index, (tokens, chunks) in enumerate(parts):
                    for carried, sums in zip((kept.values[index], kept.features[index]), own, strict=True):
                        group.put_all(carried, sums)
                    before = kept.reference_before(group, tokens)
                    part = make_segment(group, tokens, chunks, kept.inputs(), feature_map, before)
                    own = _attend(part, own, group, tokens, out, kept, settings.epsilon)
                for sums, last in zip(after, own, strict=True):
                    group.put_all(sums, last)
        last = None if kept.references is None else kept.references[..., -1].clone()
        ctx.save_for_backward(*kept)
        ctx.settings = settings
        if last is not None:
            ctx.mark_non_differentiable(last)
        return out, *after, last

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor, grad_values: Tensor, grad_features: Tensor, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        kept, settings = _Kept(*ctx.saved_tensors), ctx.settings
        grads = tuple(torch.empty_like(x, dtype=grad.dtype) for x in (kept.q, kept.k, kept.v))
        grad_values, grad_features = grad_values.clone(), grad_features.clone()
        parts = list(enumerate(segments(grad.shape[2], settings.chunk)))
        with full_precision(grad.device):
            for group in head_groups(grad, SEGMENT_HEADS):
                after = grad_values[group].flatten(0, 1), grad_features[group].flatten(0, 1)
                for index, (tokens, chunks) in reversed(parts):
                    before = kept.reference_before(group, tokens)
                    part = make_segment(group, tokens, chunks, kept.inputs(), settings.feature_map, before)
                    after = _attend_back(part, after, index, group, tokens, grad, grads, kept, settings.feature_map)
                for sums, of_sums in zip((grad_values, grad_features), after, strict=True):
                    group.put_all(sums, of_sums)
        return *grads, grad_values, grad_features, None, None, None


def _attend(
    part: Segment,
    sums: tuple[Tensor, Tensor],
    group: Heads,
    tokens: slice,
    out: Tensor,
    kept: _Kept,
    epsilon: float | None,
) -> tuple[Tensor, Tensor]:
    """Write the result of a segment; returns the sums after it."""
    before_values, after_values = part.prefix_values(sums[0], part.written_values())
    before_features, after_features = part.prefix_features(sums[1])
    weights, read = part.weights(), part.factors.read
    mixed = part.q @ before_values
    mixed = mixed if read is None else mixed.mul_(read)
    torch.baddbmm(mixed, weights, part.v, out=mixed)
    if kept.total is not None and epsilon is not None:
        total = scaled((part.q * before_features).sum(dim=-1, keepdim=True), read)
        total = total.add_(weights.sum(dim=-1, keepdim=True)).add_(epsilon)
        group.put(kept.total, total.view(part.groups, -1), tokens)
        place = in_chunks(group.room(out, tokens, mixed.dtype), part.chunks)
        mixed = torch.div(mixed, total, out=place)
    group.put(out, whole(mixed, part.groups), tokens)
    if kept.references is not None and part.references is not None:
        group.put(kept.references, part.references, tokens)
    return after_values, after_features


def _attend_back(
    part: Segment,
    after: tuple[Tensor, Tensor],
    index: int,
    group: Heads,
    tokens: slice,
    grad: Tensor,
    grads: tuple[Tensor, ...],
    kept: _Kept,
    feature_map: FeatureMap,
) -> tuple[Tensor, Tensor]:
    """Write the gradients of q, k and v in a segment; returns those of the sums before it."""
    read, write = part.factors.read, part.factors.write
    of_mixed, of_total = group.take(grad, part.q.dtype, tokens), None
    if kept.out is not None and kept.total is not None:
        of_mixed, of_total = gradients_of_division(group, tokens, of_mixed, kept.out, kept.total)
        of_total = in_chunks(of_total, part.chunks)
    of_mixed = in_chunks(of_mixed, part.chunks)

    written, of_read = part.written_values(), scaled(of_mixed, read)
    before_values, _ = part.prefix_values(kept.values[index][group].flatten(0, 1), written)
    of_values, of_own = part.suffix_values(of_read, after[0])

    of_weights = of_mixed @ part.v.mT
    of_weights = (of_weights if of_total is None else of_weights.add_(of_total)).mul_(part.factors.pairs)
    of_q, of_k = of_weights @ part.k, of_weights.mT @ part.q
    torch.baddbmm(of_q, of_read, before_values.mT, out=of_q)
    torch.baddbmm(of_k, written, of_own.mT, out=of_k)
    of_v = part.k @ of_own
    of_v = of_v if write is None else of_v.mul_(write)
    torch.baddbmm(of_v, part.weights().mT, of_mixed, out=of_v)

    if of_total is not None:
        of_total = scaled(of_total, read)
        before_features, _ = part.prefix_features(kept.features[index][group].flatten(0, 1))
        of_q.addcmul_(of_total, before_features)
    of_features, of_own = part.suffix_features(of_total, after[1])
    of_k = of_k.add_(of_own) if write is None else of_k.addcmul_(write, of_own)

    of_q, of_k = whole(of_q, part.groups), whole(of_k, part.groups)
    if kept.valid is not None:
        of_k.masked_fill_(group.hidden(kept.valid, tokens), 0.0)
    places = [group.room(place, tokens, of_q.dtype) for place in grads]
    of_q = feature_map.gradient(part.q_rows, whole(part.q, part.groups), of_q, places[0], keys=False)
    of_k = feature_map.gradient(part.k_rows, whole(part.k, part.groups), of_k, places[1], keys=True)
    for place, part_grad in zip(grads, (of_q, of_k, whole(of_v, part.groups)), strict=True):
        group.put(place, part_grad, tokens)
    return of_values, of_features
