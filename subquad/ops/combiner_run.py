"""Running a plan: summaries of all regions, then every query over tokens and summaries, some heads at a time.

Autograd keeps q, k, v, the result and its log-sum-exp; summaries are made again in the backward pass, while a head's
tokens are in the cache.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.combiner_plans import Layout, Plan
from subquad.ops.rectangles import SUMMARIES, TOKENS, Part, Queries, Source
from subquad.ops.region_pooling import MAXIMUM, SUM

GROUP_BYTES = 2**20
"""Queries of the heads that run together: few enough that they stay in the cache."""


class Options(NamedTuple):
    """How regions are summarised, but for the weights.

    Attributes:
        reduce: "max", "mean" or "sum".
        rectified: whether negative features count as 0.
        log_size: whether a region's score grows by the logarithm of its size.
    """

    reduce: str
    rectified: bool
    log_size: bool


class Example(NamedTuple):
    """What one example runs.

    Attributes:
        length: tokens up to the last real one.
        padded: the multiple of the plan's unit to which they are filled up.
        layout: of that length, its parts with the masks of this example.
        plan: the plan.
        kept: bool (padded,), the real ones where others may be seen; None where none can be.
        sizes: (R,), real tokens in each region, where that matters.
        gaps: whether tokens before the last real one are not real.
    """

    length: int
    padded: int
    layout: Layout
    plan: Plan
    kept: Tensor | None
    sizes: Tensor | None
    gaps: bool


def prepare_examples(
    q: Tensor, plan: Plan, causal: bool, valid: Tensor | None, options: Options
) -> list[Example | None]:
    """The examples of a batch; None for one without real tokens."""
    wide, length = torch.promote_types(q.dtype, torch.float32), q.shape[2]
    with torch.device(q.device):
        if valid is None:
            return [_whole_example(plan, length, causal, options, wide, q.device)] * q.shape[0]
        examples: list[Example | None] = []
        for row in valid:
            count = int(row.sum())
            last = int(row.nonzero()[-1]) + 1 if count else 0
            if count == 0:
                examples.append(None)
            elif count == last:
                examples.append(_whole_example(plan, last, causal, options, wide, q.device))
            else:
                examples.append(_prepare(plan, row[:last], causal, options, wide))
        return examples


@lru_cache(maxsize=64)
def _whole_example(
    plan: Plan, length: int, causal: bool, options: Options, dtype: torch.dtype, device: torch.device
) -> Example:
    """All tokens are real. A pure function, remembered because layers ask again with the same arguments."""
    return _prepare(plan, torch.ones(length, dtype=torch.bool), causal, options, dtype)


def _prepare(plan: Plan, kept: Tensor, causal: bool, options: Options, dtype: torch.dtype) -> Example:
    length, gaps = len(kept), not bool(kept.all())
    padded = length + -length % plan.unit(length)
    layout = plan.layout(padded, causal=causal)
    hiding = gaps or (padded > length and not causal)
    kept = F.pad(kept, (0, padded - length))
    sizes = None
    added: dict[str, Tensor] = {}
    if hiding or options.log_size or options.reduce == "mean":
        counted = kept if hiding else torch.ones_like(kept)
        sizes = layout.sizes(counted.to(dtype)[None, :, None])
        if options.log_size:
            added[SUMMARIES] = sizes.log()
        elif bool((sizes == 0).any()):
            added[SUMMARIES] = torch.zeros_like(sizes).masked_fill_(sizes == 0, -torch.inf)
    if hiding:
        added[TOKENS] = torch.zeros(padded, dtype=dtype).masked_fill_(~kept, -torch.inf)
    layout = layout._replace(
        summaries=[part.restrict(added, dtype) for part in layout.summaries],
        parts=[part.restrict(added, dtype) for part in layout.parts],
    )
    return Example(length, padded, layout, plan, kept if hiding else None, sizes, gaps)


class _Summaries(NamedTuple):
    """Summaries of regions.

    Attributes:
        query: (G, R, E).
        key: (G, R, E).
        value: (G, R, E).
        lse: (G, R), of the scores inside each region, finite.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    lse: Tensor


class _Run(NamedTuple):
    """Some heads of an example.

    Attributes:
        example: what is run.
        options: how regions are summarised.
        q: (G, padded, E).
        k: likewise.
        v: likewise.
        query_weight: (E, E) or None.
        key_weight: likewise.
    """

    example: Example
    options: Options
    q: Tensor
    k: Tensor
    v: Tensor
    query_weight: Tensor | None
    key_weight: Tensor | None

    @property
    def scale(self) -> float:
        """1 / √E."""
        return 1 / math.sqrt(self.q.shape[-1])

    @property
    def weighted(self) -> bool:
        """Whether keys of regions are averages, made as the values are."""
        return getattr(self.example.plan, "weighted_keys", False)

    def pool(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Tokens (G, padded, E) to regions (G, R, E); differentiable."""
        example, layout = self.example, self.example.layout
        if example.plan.asks_tokens:
            return layout.pool(x, SUM)
        if self.options.rectified:
            x = (x if weight is None else x @ weight.T).relu()
        reduction = MAXIMUM if self.options.reduce == "max" else SUM
        if example.kept is not None:
            x = x.masked_fill(~example.kept[:, None], reduction.neutral)
        pooled = layout.pool(x, reduction)
        if example.sizes is None:
            return pooled if reduction is SUM else pooled.masked_fill(pooled == -torch.inf, 0.0)
        if self.options.reduce == "mean":
            pooled = pooled / example.sizes.clamp_min(1)[:, None]
        return pooled.masked_fill((example.sizes == 0)[:, None], 0.0)

    def summarise(self) -> _Summaries:
        """The summaries of all regions."""
        query, value = self.pool(self.q, self.query_weight), None
        value, lse = self._read(query, self.v)
        key = self._read(query, self.k)[0] if self.weighted else self.pool(self.k, self.key_weight)
        return _Summaries(query, key, value, lse.masked_fill_(lse == -torch.inf, 0.0))

    def _read(self, query: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        queries = Queries(query, torch.zeros_like(query), torch.full_like(query[..., 0], -torch.inf))
        for part in self.example.layout.summaries:
            part.forward(queries, {TOKENS: Source(self.k, values)}, self.scale, fresh=True)
        return queries.out, queries.lse

    def forward(self, out: Tensor, lse: Tensor) -> None:
        """Fill out (G, padded, E) and lse (G, padded)."""
        made = self.summarise()
        sources = {TOKENS: Source(self.k, self.v), SUMMARIES: Source(made.key, made.value)}
        for index, part in enumerate(self.example.layout.parts):
            part.forward(Queries(self.q, out, lse), sources, self.scale, fresh=index == 0)
        lse.masked_fill_(lse == -torch.inf, 0.0)

    def backward(self, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v (G, padded, E) and of the weights."""
        made, layout = self.summarise(), self.example.layout
        of_q, of_k, of_v = (torch.zeros_like(x) for x in (self.q, self.k, self.v))
        of_query, of_key, of_value = (torch.zeros_like(x) for x in made[:3])
        sources = {TOKENS: Source(self.k, self.v), SUMMARIES: Source(made.key, made.value)}
        grads = {TOKENS: Source(of_k, of_v), SUMMARIES: Source(of_key, of_value)}
        for part in layout.parts:
            part.backward(grad, Queries(self.q, out, lse), sources, of_q, grads, self.scale)
        for part in layout.summaries:
            queries = Queries(made.query, made.value, made.lse)
            part.backward(of_value, queries, sources, of_query, grads, self.scale)
            if self.weighted:
                queries, twice = queries._replace(out=made.key), {TOKENS: Source(self.k, self.k)}
                part.backward(of_key, queries, twice, of_query, {TOKENS: Source(of_k, of_k)}, self.scale)
        of_query_weight = self._pool_backward(self.q, self.query_weight, of_query, of_q)
        of_key_weight = None
        if not self.weighted:
            of_key_weight = self._pool_backward(self.k, self.key_weight, of_key, of_k)
        return of_q, of_k, of_v, of_query_weight, of_key_weight

    def _pool_backward(self, x: Tensor, weight: Tensor | None, grad: Tensor, total: Tensor) -> Tensor | None:
        """Add the gradient of the pooled tokens to `total`; that of the weight is returned."""
        if not grad.shape[1]:
            return None if weight is None else torch.zeros_like(weight)
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (x, weight) if tensor is not None]
            pooled = self.pool(leaves[0], leaves[1] if len(leaves) > 1 else None)
            found = torch.autograd.grad(pooled, leaves, grad)
        total.add_(found[0])
        return found[1] if len(found) > 1 else None


class _Combine(torch.autograd.Function):
    """One node of the graph for everything."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_weight: Tensor | None,
        key_weight: Tensor | None,
        examples: list[Example | None],
        options: Options,
    ) -> Tensor:
        out = torch.zeros_like(q) if None in examples or _ragged(examples, q) else torch.empty_like(q)
        lse = torch.zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        for index, example in enumerate(examples):
            if example is None:
                continue
            for heads in _groups(q, example):
                run = _run(example, options, (q, k, v), index, heads, query_weight, key_weight)
                found, found_lse = torch.empty_like(run.q), torch.full_like(run.q[..., 0], -torch.inf)
                run.forward(found, found_lse)
                out[index, heads, : example.length] = found[:, : example.length]
                lse[index, heads, : example.length] = found_lse[:, : example.length]
        ctx.save_for_backward(q, k, v, query_weight, key_weight, out, lse)
        ctx.examples, ctx.options = examples, options
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, query_weight, key_weight, out, lse = ctx.saved_tensors
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        of_weights = [None if weight is None else torch.zeros_like(weight) for weight in (query_weight, key_weight)]
        for index, example in enumerate(ctx.examples):
            if example is None:
                continue
            for heads in _groups(q, example):
                run = _run(example, ctx.options, (q, k, v), index, heads, query_weight, key_weight)
                given = (_fill_up(x[index, heads, : example.length], example) for x in (grad, out))
                of_lse = F.pad(lse[index, heads, : example.length], (0, example.padded - example.length))
                found = run.backward(*given, of_lse)
                for total, part in zip(grads, found[:3], strict=True):
                    assert part is not None
                    total[index, heads, : example.length] = part[:, : example.length]
                for total, part in zip(of_weights, found[3:], strict=True):
                    if total is not None and part is not None:
                        total += part
        return *grads, *of_weights, None, None


def combine(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    examples: list[Example | None],
    options: Options,
) -> Tensor:
    """The result (B, H, L, E) for prepared examples."""
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    return _Combine.apply(q, k, v, query_weight, key_weight, examples, options)  # pyright: ignore[reportReturnType] - apply has no types


def _ragged(examples: list[Example | None], q: Tensor) -> bool:
    return any(example is not None and example.length < q.shape[2] for example in examples)


def _groups(q: Tensor, example: Example) -> list[slice]:
    """Heads that run together."""
    wide = torch.promote_types(q.dtype, torch.float32)
    size = max(1, GROUP_BYTES // (example.padded * q.shape[-1] * wide.itemsize))
    return [slice(head, head + size) for head in range(0, q.shape[1], size)]


def _run(
    example: Example,
    options: Options,
    qkv: tuple[Tensor, Tensor, Tensor],
    index: int,
    heads: slice,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
) -> _Run:
    q, k, v = (_fill_up(x[index, heads, : example.length], example) for x in qkv)
    weights = (None if weight is None else weight.to(q.dtype) for weight in (query_weight, key_weight))
    return _Run(example, options, q, k, v, *weights)


def _fill_up(x: Tensor, example: Example) -> Tensor:
    """(G, length, E) -> (G, padded, E), float32 or wider; x itself where that is what it is."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    missing = example.padded - example.length
    return F.pad(x, (0, 0, 0, missing)) if missing else x
