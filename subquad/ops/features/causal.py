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

from subquad.ops.chunk_products import multiply_add
from subquad.ops.features.maps import FeatureMap
from subquad.ops.features.segment import Inputs, Place, Segment, make_segment
from subquad.ops.features.slices import Workspace, head_groups
from subquad.ops.features.sums import Sums, gradients_of_division, lowest, no_sums, result_like
from subquad.ops.precision import full_precision

CHUNK = 64
"""Tokens per chunk; the result doesn't depend on it."""

SEGMENT_CHUNKS = 16
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
    sums = torch.cat((before.values, before.features[..., None]), dim=-1)
    out, after, reference = _CausalSums.apply(q, k, v, sums, before.reference, valid, settings)  # pyright: ignore[reportGeneralTypeIssues] - apply has no types
    return out, Sums(after[..., :-1], after[..., -1], reference)


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
        sums: before each segment, (segments, B, H, F, Ev + 1).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor | None
    out: Tensor | None
    total: Tensor | None
    references: Tensor | None
    first_reference: Tensor | None
    sums: Tensor

    def segment(self, place: Place, feature_map: FeatureMap, workspace: Workspace) -> Segment:
        """The segment of this place."""
        before = None
        if self.references is not None and self.first_reference is not None:
            start = place.tokens.start
            before = (self.references[:, :, start - 1] if start else self.first_reference)[place.group]
        return make_segment(place, Inputs(self.q, self.k, self.v, self.valid), feature_map, before, workspace)


class _CausalSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sums: Tensor,
        reference: Tensor | None,
        valid: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        parts = list(segments(q.shape[2], settings.chunk))
        out, divided = result_like(q, v.shape[-1]), settings.epsilon is not None
        kept = _Kept(
            q,
            k,
            v,
            valid,
            out if divided else None,
            sums.new_empty(q.shape[:3]) if divided else None,
            None if reference is None else sums.new_empty(q.shape[:3]),
            None if reference is None else reference.clamp_min(lowest(sums.dtype)),
            sums.new_empty(len(parts), *sums.shape),
        )
        after, workspace = torch.empty_like(sums), Workspace(q, sums.dtype)
        with full_precision(q.device):
            for group in head_groups(q, sums.shape[2], SEGMENT_CHUNKS * settings.chunk):
                own = sums[group]
                for index, (tokens, chunks) in enumerate(parts):
                    kept.sums[index][group] = own
                    place = Place(group, tokens, chunks)
                    own = _attend(
                        kept.segment(place, settings.feature_map, workspace), own, place, out, kept, settings.epsilon
                    )
                after[group] = own
        last = None if kept.references is None else kept.references[..., -1].clone()
        ctx.save_for_backward(*kept)
        ctx.settings = settings
        if last is not None:
            ctx.mark_non_differentiable(last)
        return out, after, last

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor, grad_sums: Tensor, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        kept, settings = _Kept(*ctx.saved_tensors), ctx.settings
        grads = tuple(torch.empty_like(x, dtype=grad.dtype) for x in (kept.q, kept.k, kept.v))
        before, workspace = torch.empty_like(grad_sums), Workspace(grad, kept.sums.dtype)
        parts = list(enumerate(segments(grad.shape[2], settings.chunk)))
        with full_precision(grad.device):
            for group in head_groups(grad, kept.sums.shape[3], SEGMENT_CHUNKS * settings.chunk):
                after = grad_sums[group]
                for index, (tokens, chunks) in reversed(parts):
                    place = Place(group, tokens, chunks)
                    part = kept.segment(place, settings.feature_map, workspace)
                    after = _attend_back(
                        part, kept.sums[index][group], after, place, grad, grads, kept, settings.feature_map
                    )
                before[group] = after
        return *grads, before, None, None, None


def _attend(part: Segment, before: Tensor, place: Place, out: Tensor, kept: _Kept, epsilon: float | None) -> Tensor:
    """Write the result of a segment; returns the sums after it."""
    sums = part.sums(before, part.written())
    mixed = part.product("read", part.q, sums[:-1])
    if part.factors is not None:
        mixed.mul_(part.factors.read)
    multiply_add(mixed, part.weights(), part.v)
    if kept.total is not None and epsilon is not None:
        total = mixed[..., -1:].add_(epsilon)
        place.of(kept.total)[...] = total[..., 0]
        torch.div(mixed[..., :-1], total, out=place.of(out))
    else:
        place.of(out)[...] = mixed[..., :-1]
    if kept.references is not None and part.references is not None:
        place.of(kept.references)[...] = part.references
    return sums[-1]


def _attend_back(
    part: Segment,
    before: Tensor,
    after: Tensor,
    place: Place,
    grad: Tensor,
    grads: tuple[Tensor, ...],
    kept: _Kept,
    feature_map: FeatureMap,
) -> Tensor:
    """Write the gradients of q, k and v in a segment; returns those of the sums before it."""
    out, total = (None if x is None else place.of(x) for x in (kept.out, kept.total))
    of_mixed = gradients_of_division(place.of(grad), out, total, part.workspace)
    written, of_read = part.written(), part.read(of_mixed)
    sums, of_sums = part.sums(before, written), part.of_sums(of_read, after)
    of_weights = part.below(part.product("gradient of weights", of_mixed, part.v.mT))
    of_q = multiply_add(part.product("gradient of q", of_weights, part.k), of_read, sums[:-1].mT)
    of_k = multiply_add(part.product("gradient of k", of_weights.mT, part.q), written, of_sums[1:].mT)
    of_v = part.product("gradient of v", part.k, of_sums[1:, ..., :-1])
    if part.factors is not None:
        of_v.mul_(part.factors.write)
    multiply_add(of_v, part.weights().mT, of_mixed[..., :-1])
    place_q, place_k, place_v = (place.of(x) for x in grads)
    feature_map.write_gradient(part.q_rows, part.q, of_q, place_q, keys=False)
    feature_map.write_gradient(part.k_rows, part.k, of_k, place_k, keys=True)
    place_v.copy_(of_v)
    if kept.valid is not None:
        place_k.masked_fill_(place.hidden(kept.valid), 0.0)
    return of_sums[0]
