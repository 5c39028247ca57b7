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
from subquad.ops.features.slices import HeadGroup, Workspace, head_groups, token_slices
from subquad.ops.onednn import outruns_mm
from subquad.ops.precision import full_precision, wide_dtype
from subquad.ops.stacked_products import stacked_product


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
    dtype = wide_dtype(k)
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
    joined = torch.cat((sums.values, sums.features[..., None]), dim=-1)
    return _ReadSums.apply(q, joined, feature_map, epsilon)  # pyright: ignore[reportReturnType] - apply has no types


def gradients_of_division(grad: Tensor, out: Tensor | None, total: Tensor | None, workspace: Workspace) -> Tensor:
    """Gradients of numerators and, in one more column, of denominators (..., Ev + 1) from that of the fraction.

    Args:
        grad: (..., Ev).
        out: (..., Ev), the fraction; None for numerators that were not divided.
        total: (...), the denominators.
        workspace: memory.
    """
    of_read = workspace.of("gradient of what is read", *grad.shape[:-1], grad.shape[-1] + 1)
    if out is None or total is None:
        of_read[..., :-1], of_read[..., -1] = grad, 0.0
        return of_read
    numerators = torch.div(grad, total[..., None], out=of_read[..., :-1])
    products = torch.mul(numerators, out, out=workspace.of("read", *out.shape))
    torch.sum(products, dim=-1, keepdim=True, out=of_read[..., -1:]).neg_()
    return of_read


def result_like(q: Tensor, width: int) -> Tensor:
    """Empty, for a result (B, H, L, Ev), laid out as q (B, H, L, E) where the widths agree, else as (B, L, H, Ev)."""
    batch, num_heads, length, own_width = q.shape
    return torch.empty_like(q) if width == own_width else q.new_empty(batch, length, num_heads, width).transpose(1, 2)


def _product(a: Tensor, b: Tensor, name: str, workspace: Workspace) -> Tensor:
    """The products a b of (B, H, M, K) and (B, H, K, N); faster ones make up for memory that is fresh in each slice."""
    if outruns_mm():
        return stacked_product(a, b)
    out = workspace.of(name, *a.shape[:-1], b.shape[-1])
    torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))
    return out


def _outer_sums(mapped: Tensor, rows: Tensor) -> Tensor:
    """Σ_t mapped_t rows_tᵀ, (B, H, F, W), of (B, H, T, F) and (B, H, T, W).

    oneDNN wants the rows transposed. The BLAS is slow to share a long sum among threads: each gets tokens of its own.
    """
    if outruns_mm():
        return stacked_product(rows.mT, mapped).mT
    heads, threads = mapped.shape[:2], torch.get_num_threads()
    mapped, rows = mapped.flatten(0, 1), rows.flatten(0, 1)
    if mapped.shape[0] >= threads or mapped.shape[1] % threads:
        return torch.bmm(mapped.mT, rows).unflatten(0, heads)
    mapped, rows = (x.unflatten(1, (threads, -1)).flatten(0, 1) for x in (mapped, rows))
    return torch.bmm(mapped.mT, rows).unflatten(0, (*heads, threads)).sum(dim=2)


class _Keys(NamedTuple):
    """A slice of keys and values.

    Attributes:
        rows: (B, H, T, E).
        mapped: their features relative to the reference, (B, H, T, F).
        v: (B, H, T, Ev).
        hidden: bool (B, 1, T, 1), those that don't count and are 0 here; None for none.
        reference: the larger of the one given and their own peaks, (B, H, 1, 1).
    """

    rows: Tensor
    mapped: Tensor
    v: Tensor
    hidden: Tensor | None
    reference: Tensor | None


def _take_keys(
    group: HeadGroup,
    tokens: slice,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    feature_map: FeatureMap,
    reference: Tensor | None,
    workspace: Workspace,
) -> _Keys:
    """Map a slice of k, v with facts about them."""
    k, v, valid = inputs
    dtype = wide_dtype(v)
    hidden = None if valid is None else group.hidden(valid, tokens)
    rows, part_v = (x[(*group, tokens)].to(dtype) for x in (k, v))
    if hidden is not None:
        rows, part_v = rows.masked_fill(hidden, 0.0), part_v.masked_fill(hidden, 0.0)
    prepared = feature_map.prepare(rows, workspace.of("features", *rows.shape[:-1], feature_map.count(rows.shape[-1])))
    if reference is not None and prepared.peak is not None:
        peak = prepared.peak if hidden is None else prepared.peak.masked_fill(hidden, lowest(dtype))
        reference = torch.maximum(reference, peak.amax(dim=2, keepdim=True))
    mapped = feature_map.finish(prepared, reference)
    return _Keys(rows, mapped if hidden is None else mapped.masked_fill(hidden, 0.0), part_v, hidden, reference)


class _SumKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, valid: Tensor | None, feature_map: FeatureMap
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        values, features, reference = no_sums(k, v, feature_map)
        workspace = Workspace(k, values.dtype)
        with full_precision(k.device):
            for group in head_groups(k, features.shape[-1]):
                own_values, own_features = values[group], features[group]
                before = None if reference is None else reference[group][..., None, None]
                for tokens in token_slices(k.shape[2]):
                    keys = _take_keys(group, tokens, (k, v, valid), feature_map, before, workspace)
                    if before is not None and keys.reference is not None:
                        factor = (before - keys.reference).exp_()
                        own_values.mul_(factor)
                        own_features.mul_(factor[..., 0])
                        before = keys.reference
                    own_values += _outer_sums(keys.mapped, keys.v)
                    own_features += keys.mapped.sum(dim=2)
                if reference is not None and before is not None:
                    reference[group] = before[..., 0, 0]
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
        workspace = Workspace(k, grad_values.dtype)
        with full_precision(k.device):
            for group in head_groups(k, grad_features.shape[-1]):
                of_values, of_features = grad_values[group], grad_features[group][..., None, :]
                final = None if reference is None else reference[group][..., None, None]
                for tokens in token_slices(k.shape[2]):
                    keys = _take_keys(group, tokens, (k, v, valid), ctx.feature_map, final, workspace)
                    grad_v[(*group, tokens)] = _product(keys.mapped, of_values, "read", workspace)
                    of_mapped = _product(keys.v, of_values.mT, "gradient of features", workspace).add_(of_features)
                    if keys.hidden is not None:
                        of_mapped.masked_fill_(keys.hidden, 0.0)
                    ctx.feature_map.write_gradient(
                        keys.rows, keys.mapped, of_mapped, grad_k[(*group, tokens)], keys=True
                    )
        return grad_k, grad_v, None, None


class _ReadSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, sums: Tensor, feature_map: FeatureMap, epsilon: float | None) -> Tensor:
        out, workspace = result_like(q, sums.shape[-1] - 1), Workspace(q, sums.dtype)
        total = None if epsilon is None else sums.new_empty(q.shape[:3])
        with full_precision(q.device):
            for group in head_groups(q, sums.shape[2]):
                for tokens in token_slices(q.shape[2]):
                    part = *group, tokens
                    mapped = _map_queries(q[part].to(sums.dtype), feature_map, workspace)
                    read = _product(mapped, sums[group], "read", workspace)
                    if total is not None and epsilon is not None:
                        weight = read[..., -1:].add_(epsilon)
                        total[part] = weight[..., 0]
                        torch.div(read[..., :-1], weight, out=out[part])
                    else:
                        out[part] = read[..., :-1]
        ctx.save_for_backward(q, sums, None if total is None else out, total)
        ctx.feature_map = feature_map
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, sums, out, total = ctx.saved_tensors
        grad_q, grad_sums = torch.empty_like(q, dtype=grad.dtype), torch.zeros_like(sums)
        workspace = Workspace(q, sums.dtype)
        with full_precision(q.device):
            for group in head_groups(q, sums.shape[2]):
                for tokens in token_slices(q.shape[2]):
                    part = *group, tokens
                    rows = q[part].to(sums.dtype)
                    mapped = _map_queries(rows, ctx.feature_map, workspace)
                    divided, by = (None if x is None else x[part] for x in (out, total))
                    of_read = gradients_of_division(grad[part], divided, by, workspace)
                    grad_sums[group] += _outer_sums(mapped, of_read)
                    of_mapped = _product(of_read, sums[group].mT, "gradient of features", workspace)
                    ctx.feature_map.write_gradient(rows, mapped, of_mapped, grad_q[part], keys=False)
        return grad_q, grad_sums, None, None


def _map_queries(rows: Tensor, feature_map: FeatureMap, workspace: Workspace) -> Tensor:
    """Features (B, H, T, F) of rows (B, H, T, E)."""
    return feature_map.queries(rows, workspace.of("features", *rows.shape[:-1], feature_map.count(rows.shape[-1])))
