"""Running a plan: summaries of all regions, then every query over tokens and summaries, some heads at a time.

Autograd keeps q, k, v, the result and its log-sum-exp; summaries are made again in the backward pass, while a head's
tokens are in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.combiner_example import Example, Options
from subquad.ops.rectangles import SUMMARIES, TOKENS, Queries, Source
from subquad.ops.region_pooling import MAXIMUM, SUM

GROUP_BYTES = 2**20
"""Queries of the heads that run together: few enough that they stay in the cache."""


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
        given: summaries (G, R or more, E) that are made elsewhere; None where they are made here.
    """

    example: Example
    options: Options
    q: Tensor
    k: Tensor
    v: Tensor
    query_weight: Tensor | None
    key_weight: Tensor | None
    given: Source | None

    @property
    def scale(self) -> float:
        """1 / √E."""
        return 1 / math.sqrt(self.q.shape[-1])

    @property
    def weighted(self) -> bool:
        """Whether keys of regions are averages, made as the values are."""
        return self.example.plan.weighted_keys

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
        if self.given is not None:
            return _Summaries(self.q[:, :0], *self.given, self.q[:, :0, 0])
        query = self.pool(self.q, self.query_weight)
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
        """Gradients of q, k, v (G, padded, E), of the weights and of given summaries."""
        made, layout = self.summarise(), self.example.layout
        of_q, of_k, of_v = (torch.zeros_like(x) for x in (self.q, self.k, self.v))
        of_query, of_key, of_value = (torch.zeros_like(x) for x in made[:3])
        sources = {TOKENS: Source(self.k, self.v), SUMMARIES: Source(made.key, made.value)}
        grads = {TOKENS: Source(of_k, of_v), SUMMARIES: Source(of_key, of_value)}
        for part in layout.parts:
            part.backward(grad, Queries(self.q, out, lse), sources, of_q, grads, self.scale)
        if self.given is not None:
            return of_q, of_k, of_v, None, None, of_key, of_value
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
        return of_q, of_k, of_v, of_query_weight, of_key_weight, None, None

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


class Inputs(NamedTuple):
    """What gradients flow to.

    Attributes:
        q: (B, H, L, E).
        k: (B, H, L, E).
        v: (B, H, L, E).
        query_weight: (E, E), with which features of queries are made; None for none.
        key_weight: likewise.
        summary_keys: (B, H, R or more, E), keys of the regions where they are made elsewhere; None else.
        summary_values: likewise.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    query_weight: Tensor | None = None
    key_weight: Tensor | None = None
    summary_keys: Tensor | None = None
    summary_values: Tensor | None = None

    def run(self, example: Example, options: Options, index: int, heads: slice) -> _Run:
        """Some heads of an example, float32 or wider."""
        q, k, v = (_fill_up(x[index, heads, : example.length], example) for x in (self.q, self.k, self.v))
        query_weight, key_weight = (None if x is None else x.to(q.dtype) for x in (self.query_weight, self.key_weight))
        given = None
        if self.summary_keys is not None and self.summary_values is not None:
            regions = example.layout.regions
            keys, values = (x[index, heads, :regions].to(q.dtype) for x in (self.summary_keys, self.summary_values))
            given = Source(keys, values)
        return _Run(example, options, q, k, v, query_weight, key_weight, given)


class _Combine(torch.autograd.Function):
    """One node of the graph for everything."""

    @staticmethod
    def forward(ctx: Any, examples: list[Example | None], options: Options, *tensors: Tensor | None) -> Tensor:
        inputs = Inputs(*tensors)  # pyright: ignore[reportArgumentType] - the first three are no None
        q = inputs.q
        out = torch.zeros_like(q) if _incomplete(examples, q) else torch.empty_like(q)
        lse = torch.zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        for index, example, heads in _groups(q, examples):
            run, used = inputs.run(example, options, index, heads), slice(example.length)
            found, found_lse = torch.empty_like(run.q), torch.full_like(run.q[..., 0], -torch.inf)
            run.forward(found, found_lse)
            out[index, heads, used] = found[:, used]
            lse[index, heads, used] = found_lse[:, used]
        ctx.save_for_backward(*inputs, out, lse)
        ctx.examples, ctx.options = examples, options
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        inputs = Inputs(*tensors)
        grads = [None if x is None else torch.zeros_like(x) for x in inputs]
        for index, example, heads in _groups(inputs.q, ctx.examples):
            run, used = inputs.run(example, ctx.options, index, heads), slice(example.length)
            of_out, found_out = (_fill_up(x[index, heads, used], example) for x in (grad, out))
            of_lse = F.pad(lse[index, heads, used], (0, example.padded - example.length))
            found = Inputs(*run.backward(of_out, found_out, of_lse))  # pyright: ignore[reportArgumentType] - as above
            for name in ("q", "k", "v", "summary_keys", "summary_values"):
                total, part = grads[Inputs._fields.index(name)], getattr(found, name)
                if total is not None and part is not None:
                    rows = min(part.shape[1], example.length) if name in ("q", "k", "v") else part.shape[1]
                    total[index, heads, :rows] = part[:, :rows]
            for total, part in zip(grads[3:5], found[3:5], strict=True):
                if total is not None and part is not None:
                    total += part
        return None, None, *grads


def combine(inputs: Inputs, examples: list[Example | None], options: Options) -> Tensor:
    """The result (B, H, L, E) for prepared examples."""
    q, k, v, *others = inputs
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    return _Combine.apply(examples, options, q, k, v, *others)  # pyright: ignore[reportReturnType] - apply has no types


def _incomplete(examples: list[Example | None], q: Tensor) -> bool:
    return any(example is None or example.length < q.shape[2] for example in examples)


def _groups(q: Tensor, examples: list[Example | None]) -> Iterator[tuple[int, Example, slice]]:
    """Examples with real tokens, and heads of them that run together."""
    wide = torch.promote_types(q.dtype, torch.float32)
    for index, example in enumerate(examples):
        if example is not None:
            size = max(1, GROUP_BYTES // (example.padded * q.shape[-1] * wide.itemsize))
            yield from ((index, example, slice(head, head + size)) for head in range(0, q.shape[1], size))


def _fill_up(x: Tensor, example: Example) -> Tensor:
    """(G, length, E) -> (G, padded, E), float32 or wider; x itself where that is what it is."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    missing = example.padded - example.length
    return F.pad(x, (0, 0, 0, missing)) if missing else x
