"""Combiner: full attention whose distant keys are grouped in regions, each attended through one summary.

A plan splits what query i may see into tokens Ω⁰ attended directly and disjoint regions Ω¹, Ω², ...; with r over these

    o_i = Σ_{j in Ω⁰} exp(q_i · k_j / √E) / Z v_j + Σ_r exp(q_i · k_r / √E) / Z μ_r       Z the sum of all numerators
    μ_r = Σ_{j in r} softmax_{j in r}(q_r · k_j / √E) v_j       q_r, k_r = elementwise maxima of the region's q and k

The weight of token j in region r is the product of two softmaxes, so that a query's weights sum to 1 over everything it
may see. A region weighs as much as one token with its key, whatever its size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subquad.ops.combiner.grid import Rowmajor
from subquad.ops.combiner.plans import Plan, Region
from subquad.ops.combiner.prepare import prepare_examples
from subquad.ops.combiner.run import Inputs, combine
from subquad.ops.combiner.summarize import Options, Summarize
from subquad.ops.precision import full_precision, wide_dtype


def combiner_attention_by_regions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    causal: bool,
    valid: Tensor | None = None,
    summarize: Summarize | None = None,
) -> Tensor:
    """The definition, query by query. Arguments and result as in `combiner_attention`."""
    length, wide = q.shape[2], wide_dtype(q)
    valid = torch.ones(q.shape[0], length, dtype=torch.bool) if valid is None else valid
    examples = []
    for b in range(q.shape[0]):
        kept = [bool(x) for x in valid[b]]
        q_b, k_b, v_b = (x[b].to(wide).masked_fill(~valid[b, :, None], 0.0).transpose(0, 1) for x in (q, k, v))
        of_example = _OneExample(q_b, k_b, v_b, plan, summarize or Summarize(), kept)
        rows = [of_example.attend(i, causal) if kept[i] else 0 * q_b[i] for i in range(length)]
        examples.append(torch.stack(rows, dim=1))
    return torch.stack(examples).to(q.dtype)


class _OneExample:
    """The definition for one example: q, k, v (L, H, E), and which tokens are real."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, summarize: Summarize, kept: list[bool]) -> None:
        self.q, self.k, self.v, self.plan, self.summarize, self.kept = q, k, v, plan, summarize, kept
        self.known: dict[Region, tuple[Tensor, Tensor]] = {}

    def attend(self, i: int, causal: bool) -> Tensor:
        """What query i gets, (H, E)."""
        direct, regions = self.plan.partition(i, len(self.kept), causal=causal)
        direct = [j for j in direct if self.kept[j]]
        keys, values, added = [self.k[j] for j in direct], [self.v[j] for j in direct], [0.0] * len(direct)
        for region in regions:
            region = region._replace(tokens=tuple(j for j in region.tokens if self.kept[j]))
            if region.tokens:
                key, value = self.summary(region)
                keys.append(key)
                values.append(value)
                added.append(math.log(len(region.tokens)) if self.summarize.log_size else 0.0)
        bias = torch.tensor(added, dtype=self.q.dtype)[:, None]
        scores = (torch.stack(keys) * self.q[i]).sum(dim=-1) / math.sqrt(self.q.shape[-1]) + bias
        return (scores.softmax(dim=0)[..., None] * torch.stack(values)).sum(dim=0)

    def summary(self, region: Region) -> tuple[Tensor, Tensor]:
        """Key and value of a region, each (H, E)."""
        if region not in self.known:
            members = list(region.tokens)
            query = self.pooled(self.q, region, self.summarize.query_weight)
            key = self.pooled(self.k, region, self.summarize.key_weight)
            scores = (self.k[members] * query).sum(dim=-1) / math.sqrt(query.shape[-1])
            weights = scores.softmax(dim=0)[..., None]
            key = self.plan.region_summary.key_of_region(key, weights, self.k[members])
            self.known[region] = key, (weights * self.v[members]).sum(dim=0)
        return self.known[region]

    def pooled(self, x: Tensor, region: Region, weight: Tensor | None) -> Tensor:
        """One row (H, E) of those of a region."""
        if region.asking is not None:
            return x[region.asking] if region.asking < len(x) else torch.zeros_like(x[0])
        members = x[list(region.tokens)]
        if self.summarize.activation != "identity":
            members = (members if weight is None else members @ weight.T).relu()
        if self.summarize.reduce == "max":
            return members.max(dim=0).values
        return members.sum(dim=0) if self.summarize.reduce == "sum" else members.mean(dim=0)


def combiner_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    causal: bool,
    valid: Tensor | None = None,
    summarize: Summarize | None = None,
) -> Tensor:
    """Attend by a plan, in memory linear in the length.

    Args:
        q: (B, H, L, E), any strides.
        k: (B, H, L, E).
        v: (B, H, L, E).
        plan: `Fixed(size)`, `Logsparse()`, `Vertical(columns)`, `Horizontal(columns)`, `Rowmajor(columns)` or
            `JointMixture(columns)`.
        causal: query i sees the keys 0..i.
        valid: bool (B, L), True for real tokens. The others keep their places in the plan, but no region holds them,
            and their result is 0.
        summarize: how regions are summarised; by elementwise maxima if None.

    Returns:
        (B, H, L, E), the dtype of q.

    Raises:
        ValueError: shapes that don't fit together, or what the plan doesn't have.
    """
    summarize = Summarize() if summarize is None else summarize
    _check(q, k, v, plan, causal, valid, summarize)
    inputs = Inputs(q, k, v, summarize.query_weight, summarize.key_weight)
    return _combine(inputs, plan, causal, valid, summarize.options)


def combiner_attention_with_summaries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_keys: Tensor,
    summary_values: Tensor,
    plan: Rowmajor,
    *,
    causal: bool,
    valid: Tensor | None = None,
    log_size: bool = False,
) -> Tensor:
    """Attend by a plan whose regions are summarised by the caller.

    Args:
        q: (B, H, L, E), any strides.
        k: (B, H, L, E).
        v: (B, H, L, E).
        summary_keys: (B, H, R, E), what a query in the same column sees of each token's row; R tokens, causal: at
            least all that have a row after them, else as many as fill all rows.
        summary_values: (B, H, R, E).
        plan: the grid.
        causal: query i sees the keys 0..i and the summaries of earlier rows.
        valid: bool (B, L), as in `combiner_attention`.
        log_size: as in `Summarize`.

    Returns:
        (B, H, L, E), the dtype of q.

    Raises:
        ValueError: as in `combiner_attention`, and too few summaries.
    """
    _check(q, k, v, plan, causal, valid, Summarize())
    whole = q.shape[2] + -q.shape[2] % plan.unit(q.shape[2]) if q.shape[2] else 0
    needed = max(0, whole - plan.unit(max(1, q.shape[2]))) if causal else whole
    if summary_keys.shape != summary_values.shape or summary_keys.shape[2] < needed:
        shapes = f"{tuple(summary_keys.shape)} and {tuple(summary_values.shape)}"
        raise ValueError(f"combiner_attention_with_summaries: expected two of {needed} summaries or more, got {shapes}")
    inputs = Inputs(q, k, v, None, None, summary_keys, summary_values)
    return _combine(inputs, plan, causal, valid, Summarize(log_size=log_size).options)


def _combine(inputs: Inputs, plan: Plan, causal: bool, valid: Tensor | None, options: Options) -> Tensor:
    if not inputs.q.numel():
        return inputs.q
    examples = prepare_examples(inputs.q, plan, causal, valid, options)
    if any(example is not None and example.gaps for example in examples):
        assert valid is not None
        q, k, v = (x.masked_fill(~valid[:, None, :, None], 0.0) for x in inputs[:3])
        inputs = inputs._replace(q=q, k=k, v=v)
    with full_precision(inputs.q.device):
        out = combine(inputs, examples, plan.region_summary, options)
    return out if valid is None else out.masked_fill(~valid[:, None, :, None], 0.0)


def _check(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, causal: bool, valid: Tensor | None, summarize: Summarize
) -> None:
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q, k, v))
        raise ValueError(f"combiner_attention: q, k and v must be (B, H, L, E), all of one shape; got {shapes}")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != (q.shape[0], q.shape[2])):
        expected = (q.shape[0], q.shape[2])
        raise ValueError(f"combiner_attention: valid must be bool {expected}, got {valid.dtype} {tuple(valid.shape)}")
    if not causal and not plan.bidirectional:
        raise ValueError(f"combiner_attention: {plan} is causal alone; pass causal=True or choose another plan")
    plan.check_summarize(summarize)
    weights = summarize.query_weight, summarize.key_weight
    deepset, square = summarize.activation == "deepset", (q.shape[3], q.shape[3])
    if any((None if weight is None else weight.shape) != (square if deepset else None) for weight in weights):
        raise ValueError(
            f"combiner_attention: activation='deepset' needs query_weight and key_weight of shape {square}, and "
            f"{summarize.activation!r} was got with {[None if w is None else tuple(w.shape) for w in weights]}"
        )
