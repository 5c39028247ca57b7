"""Linear attention over all keys: sums of them, and what queries read from the sums.

    S = Σ_j φ(k_j) v_jᵀ, z = Σ_j φ(k_j)        o_i = φ(q_i)ᵀ S / (φ(q_i)ᵀ z + ε)

Features are made slice by slice, and again in the backward pass; autograd keeps q, k, v, the sums, the result and its
denominators. Sums of exponentials are relative to exp(c), with c the largest exponent of a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.features.maps import FeatureMap
from subquad.ops.features.slices import Heads, head_groups, token_slices
from subquad.ops.precision import full_precision
from subquad.ops.stacked_products import stacked_product

FEATURES_WORTH_A_COPY = 128
"""Features for which the faster product makes up for a transposed copy of the values."""


class Sums(NamedTuple):
    """What linear attention remembers of keys and values.

    Attributes:
        values: S, (B, H, F, Ev), float32 or wider, as all.
        features: z, (B, H, F).
        reference: c, (B, H): the sums are those of features divided by exp(c); None for features without exponents.
    """

    values: Tensor
    features: Tensor
    reference: Tensor | None = None


def lowest(dtype: torch.dtype) -> float:
    """The reference of no keys: exp(lowest - x) is 0, and 1 where x is lowest too, never NaN."""
    return torch.finfo(dtype).min / 2


def no_sums(k: Tensor, v: Tensor, feature_map: FeatureMap) -> Sums:
    """The sums over no keys, for k (B, H, S, E) and v (B, H, S, Ev)."""
    dtype = torch.promote_types(k.dtype, torch.float32)
    shape = (*k.shape[:2], feature_map.count(k.shape[-1]))
    reference = k.new_full(shape[:2], lowest(dtype), dtype=dtype) if feature_map.exponential else None
    return Sums(k.new_zeros(*shape, v.shape[-1], dtype=dtype), k.new_zeros(shape, dtype=dtype), reference)


def sum_keys(k: Tensor, v: Tensor, feature_map: FeatureMap, valid: Tensor | None = None) -> Sums:
    """Sums over all keys.

    Args:
        k: (B, H, S, E), any floating dtype.
        v: (B, H, S, Ev).
        feature_map: φ.
        valid: bool (B, S), True for the keys that count.
    """
    return Sums(*_SumKeys.apply(k, v, valid, feature_map))  # pyright: ignore[reportGeneralTypeIssues] - apply has no types


def read_sums(q: Tensor, sums: Sums, feature_map: FeatureMap, *, epsilon: float | None) -> Tensor:
    """What queries read from sums over all keys.

    Args:
        q: (B, H, L, E).
        sums: over all keys.
        feature_map: φ.
        epsilon: added to the denominator; None for no division.

    Returns:
        (B, H, L, Ev), the dtype of q.
    """
    return _ReadSums.apply(q, sums.values, sums.features, feature_map, epsilon)  # pyright: ignore[reportReturnType] - apply has no types


def gradients_of_division(
    group: Heads, tokens: slice, grad: Tensor, out: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of numerators (G, T, Ev) and denominators (G, T, 1) from that of the fraction.

    Args:
        group: heads of the slice.
        tokens: its tokens.
        grad: (G, T, Ev).
        out: (B, H, L, Ev), the fraction.
        total: (B, H, L), the denominator.
    """
    of_read = grad / group.take(total, grad.dtype, tokens)[..., None]
    of_total = (of_read * group.take(out, grad.dtype, tokens)).sum(dim=-1, keepdim=True).neg_()
    return of_read, of_total


def result_like(q: Tensor, width: int) -> Tensor:
    """Room for a result (B, H, L, Ev), laid out as q (B, H, L, E) where the widths agree, else as (B, L, H, Ev)."""
    batch, num_heads, length, own_width = q.shape
    return torch.empty_like(q) if width == own_width else q.new_empty(batch, length, num_heads, width).transpose(1, 2)


def _outer_sums(mapped: Tensor, rows: Tensor) -> Tensor:
    """Σ_t mapped_t rows_tᵀ, (G, F, Ev), of (G, T, F) and (G, T, Ev).

    oneDNN wants the rows transposed, a copy that pays off for many features. The BLAS is slow to share a long sum among
    threads, so each gets tokens of its own.
    """
    if mapped.shape[2] >= FEATURES_WORTH_A_COPY:
        return stacked_product(rows.mT, mapped).mT
    threads = torch.get_num_threads()
    if mapped.shape[0] >= threads or mapped.shape[1] % threads:
        return torch.bmm(mapped.mT, rows)
    mapped, rows = (x.unflatten(1, (threads, -1)).flatten(0, 1) for x in (mapped, rows))
    return torch.bmm(mapped.mT, rows).unflatten(0, (-1, threads)).sum(dim=1)


class _Keys(NamedTuple):
    """A slice of keys and values.

    Attributes:
        rows: (G, T, E).
        mapped: their features relative to the reference, (G, T, F).
        v: (G, T, Ev).
        hidden: bool (G, T, 1), those that don't count and are 0 here; None for none.
        reference: the larger of the one given and their own peaks, (G, 1, 1).
    """

    rows: Tensor
    mapped: Tensor
    v: Tensor
    hidden: Tensor | None
    reference: Tensor | None


def _take_keys(
    group: Heads,
    tokens: slice,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    feature_map: FeatureMap,
    reference: Tensor | None,
) -> _Keys:
    """Map a slice of k, v with facts about them."""
    k, v, valid = inputs
    dtype = torch.promote_types(v.dtype, torch.float32)
    hidden = None if valid is None else group.hidden(valid, tokens)
    rows, part_v = group.take(k, dtype, tokens, hidden), group.take(v, dtype, tokens, hidden)
    prepared = feature_map.prepare(rows)
    if reference is not None and prepared.peak is not None:
        peak = prepared.peak if hidden is None else prepared.peak.masked_fill(hidden, lowest(dtype))
        reference = torch.maximum(reference, peak.amax(dim=1, keepdim=True))
    mapped = feature_map.finish(prepared, reference)
    return _Keys(rows, mapped if hidden is None else mapped.masked_fill(hidden, 0.0), part_v, hidden, reference)


class _SumKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, valid: Tensor | None, feature_map: FeatureMap
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        values, features, reference = no_sums(k, v, feature_map)
        with full_precision(k.device):
            for group in head_groups(k):
                own_values, own_features = values[group].flatten(0, 1), features[group].flatten(0, 1)
                before = None if reference is None else reference[group].reshape(-1, 1, 1)
                for tokens in token_slices(k.shape[2]):
                    keys = _take_keys(group, tokens, (k, v, valid), feature_map, before)
                    if before is not None and keys.reference is not None:
                        factor = (before - keys.reference).exp_()
                        own_values, own_features = own_values * factor, own_features * factor[:, 0]
                        before = keys.reference
                    own_values = own_values + _outer_sums(keys.mapped, keys.v)
                    own_features = own_features + keys.mapped.sum(dim=1)
                group.put_all(values, own_values)
                group.put_all(features, own_features)
                if reference is not None and before is not None:
                    group.put_all(reference, before)
        ctx.save_for_backward(k, v, valid, reference)
        ctx.feature_map = feature_map
        if reference is not None:
            ctx.mark_non_differentiable(reference)
        return values, features, reference

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad_values: Tensor, grad_features: Tensor, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        k, v, valid, reference = ctx.saved_tensors
        grad_k, grad_v = torch.empty_like(k, dtype=v.dtype), torch.empty_like(v)
        with full_precision(k.device):
            for group in head_groups(k):
                of_values, of_features = grad_values[group].flatten(0, 1), grad_features[group].flatten(0, 1)[:, None]
                final = None if reference is None else reference[group].reshape(-1, 1, 1)
                for tokens in token_slices(k.shape[2]):
                    keys = _take_keys(group, tokens, (k, v, valid), ctx.feature_map, final)
                    group.put(grad_v, stacked_product(keys.mapped, of_values), tokens)
                    of_mapped = stacked_product(keys.v, of_values.mT).add_(of_features)
                    if keys.hidden is not None:
                        of_mapped.masked_fill_(keys.hidden, 0.0)
                    place = group.room(grad_k, tokens, keys.v.dtype)
                    of_rows = ctx.feature_map.gradient(keys.rows, keys.mapped, of_mapped, place, keys=True)
                    group.put(grad_k, of_rows, tokens)
        return grad_k, grad_v, None, None


class _ReadSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, values: Tensor, features: Tensor, feature_map: FeatureMap, epsilon: float | None
    ) -> Tensor:
        out = result_like(q, values.shape[-1])
        total = None if epsilon is None else values.new_empty(q.shape[:3])
        with full_precision(q.device):
            for group in head_groups(q):
                own_values, own_features = values[group].flatten(0, 1), features[group].flatten(0, 1)[:, None]
                for tokens in token_slices(q.shape[2]):
                    mapped = feature_map.queries(group.take(q, values.dtype, tokens))
                    read = stacked_product(mapped, own_values)
                    if total is not None and epsilon is not None:
                        weight = (mapped * own_features).sum(dim=-1, keepdim=True).add_(epsilon)
                        group.put(total, weight[..., 0], tokens)
                        read = torch.div(read, weight, out=group.room(out, tokens, values.dtype))
                    group.put(out, read, tokens)
        ctx.save_for_backward(q, values, features, None if total is None else out, total)
        ctx.feature_map = feature_map
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, values, features, out, total = ctx.saved_tensors
        grad_q = torch.empty_like(q, dtype=grad.dtype)
        grad_values, grad_features = torch.empty_like(values), torch.empty_like(features)
        with full_precision(q.device):
            for group in head_groups(q):
                own_values, own_features = values[group].flatten(0, 1), features[group].flatten(0, 1)[:, None]
                of_values, of_features = torch.zeros_like(own_values), torch.zeros_like(own_features)
                for tokens in token_slices(q.shape[2]):
                    rows, of_total = group.take(q, values.dtype, tokens), None
                    mapped, of_read = ctx.feature_map.queries(rows), group.take(grad, values.dtype, tokens)
                    if out is not None and total is not None:
                        of_read, of_total = gradients_of_division(group, tokens, of_read, out, total)
                    of_mapped = stacked_product(of_read, own_values.mT)
                    if of_total is not None:
                        of_mapped.addcmul_(of_total, own_features)
                        of_features = torch.baddbmm(of_features, of_total.mT, mapped)
                    of_values = of_values + _outer_sums(mapped, of_read)
                    place = group.room(grad_q, tokens, values.dtype)
                    of_rows = ctx.feature_map.gradient(rows, mapped, of_mapped, place, keys=False)
                    group.put(grad_q, of_rows, tokens)
                group.put_all(grad_values, of_values)
                group.put_all(grad_features, of_features)
        return grad_q, grad_values, grad_features, None, None
