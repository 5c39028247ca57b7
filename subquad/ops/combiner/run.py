"""Running a plan: summaries of all regions, then every query over tokens and summaries, some heads at a time.

Autograd keeps q, k and v, and where results of parts are merged also the result and its log-sum-exp; summaries are
made again in the backward pass, while a head's tokens are in the cache.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.combiner.example import Example, Options
from subquad.ops.combiner.groups import Group, WriteTarget, groups_of
from subquad.ops.combiner.pooled_tokens import Pooled, Selected
from subquad.ops.combiner.region_pooling import MAXIMUM, SUM
from subquad.ops.combiner.weighted_rows import Averages, average_blocks, average_blocks_backward
from subquad.ops.rectangles import SUMMARIES, TOKENS, Queries, Source


class _Summaries(NamedTuple):
    """Summaries of regions.

    Attributes:
        query: (G, R, E).
        key: (G, R, E).
        value: (G, R, E).
        lse: (G, R), of the scores inside each region, finite.
        averages: how they were made, for blocks; None else.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    lse: Tensor
    averages: Averages | None = None

    @property
    def scores(self) -> Tensor | None:
        """Of all tokens in their blocks, where these make its summaries."""
        return None if self.averages is None else self.averages.scores


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

    def summarise(self, query: Tensor, key: Tensor | None) -> _Summaries:
        """The summaries of all regions, with their queries and, unless these are averages, keys."""
        tokens, layout = Source(self.k, self.v), self.example.layout
        made, size = layout.summaries, self.example.plan.unit(self.example.padded)
        if layout.blocks is not None:
            sizes, bias = (layout.blocks.sight.summaries_of_block(size), size), made[0].bias if made else None
            scores = layout.blocks.own_scores(self.q, self.k, self.scale) if self.example.plan.asks_tokens else None
            averages = average_blocks(query, tokens, sizes, bias, self.scale, keys=key is None, scores=scores)
            key = averages.key if key is None else key
            assert key is not None
            return _Summaries(query, key, averages.value, query[..., 0], averages)
        assert key is not None
        lse = torch.full_like(query[..., 0], -torch.inf)
        queries = Queries(query, torch.zeros_like(query), lse)
        for part in made:
            part.forward(queries, {TOKENS: tokens}, self.scale, fresh=True)
        return _Summaries(query, key, queries.out, lse.masked_fill_(lse == -torch.inf, 0.0))

    def forward(self, out: Tensor, lse: Tensor | None) -> None:
        """Fill out (G, padded, E) and, where the plan has it, lse (G, padded)."""
        scores = None
        if self.given is None:
            key = None if self.weighted else self.pool(self.k, self.key_weight)
            made = self.summarise(self.pool(self.q, self.query_weight), key)
            summaries, scores = Source(made.key, made.value), made.scores
        else:
            summaries = self.given
        sources = {TOKENS: Source(self.k, self.v), SUMMARIES: summaries}
        if self.example.layout.blocks is not None:
            self.example.layout.blocks.forward(self.q, sources, out, self.scale, scores)
        if lse is not None:
            lse.fill_(-torch.inf)
            for index, part in enumerate(self.example.layout.parts):
                part.forward(Queries(self.q, out, lse), sources, self.scale, fresh=index == 0)
            lse.masked_fill_(lse == -torch.inf, 0.0)

    def backward(self, grad: Tensor, queries: Queries | None, grads: Inputs) -> None:
        """Write the gradients of q, k, v (G, padded, E) to `grads`; add those of weights and given summaries."""
        if self.given is not None:
            assert grads.summary_keys is not None
            assert grads.summary_values is not None
            regions = self.example.layout.regions
            of_given = Source(grads.summary_keys[:, :regions], grads.summary_values[:, :regions])
            self._attend_backward(grad, queries, self.given, grads, of_given)
            return
        pooled_q = self._pooled(self.q, self.query_weight)
        pooled_k = None if self.weighted else self._pooled(self.k, self.key_weight)
        made = self.summarise(pooled_q.value, None if pooled_k is None else pooled_k.value)
        of_summaries = Source(torch.zeros_like(made.key), torch.zeros_like(made.value))
        self._attend_backward(grad, queries, Source(made.key, made.value), grads, of_summaries, made.scores)
        of_query, tokens, of_tokens = torch.zeros_like(made.query), Source(self.k, self.v), Source(grads.k, grads.v)
        if made.averages is not None:
            average_blocks_backward(of_summaries, made.averages, made.query, tokens, of_query, of_tokens, self.scale)
        else:
            asking = Queries(made.query, made.value, made.lse)
            for part in self.example.layout.summaries:
                part.backward(of_summaries.v, asking, {TOKENS: tokens}, of_query, {TOKENS: of_tokens}, self.scale)
        if made.scores is None:
            pooled_q.backward(of_query, grads.q, grads.query_weight)
        elif self.example.layout.blocks is not None:
            self.example.layout.blocks.own_scores_backward(made.scores, self.q, self.k, grads.q, grads.k, self.scale)
        if pooled_k is not None:
            pooled_k.backward(of_summaries.k, grads.k, grads.key_weight)

    def _pooled(self, x: Tensor, weight: Tensor | None) -> Pooled | Selected:
        example, options = self.example, self.options
        largest = options.reduce == "max" and not options.rectified and example.kept is None and example.sizes is None
        selected = example.layout.blocks is not None and (example.plan.asks_tokens or largest)
        return Selected(example, x) if selected else Pooled(self.pool, x, weight)

    def _attend_backward(
        self,
        grad: Tensor,
        queries: Queries | None,
        summaries: Source,
        grads: Inputs,
        of_summaries: Source,
        scores: Tensor | None = None,
    ) -> None:
        sources = {TOKENS: Source(self.k, self.v), SUMMARIES: summaries}
        added = {TOKENS: Source(grads.k, grads.v), SUMMARIES: of_summaries}
        if self.example.layout.blocks is not None:
            self.example.layout.blocks.backward(grad, self.q, sources, grads.q, added, self.scale, scores)
        if queries is not None:
            for index, part in enumerate(self.example.layout.parts):
                part.backward(grad, queries, sources, grads.q, added, self.scale, fresh=index == 0)


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

    def run(self, some: Group, options: Options) -> _Run:
        """Some heads, float32 or wider."""
        example = some.example
        q, k, v = (some.fill_up(x) for x in (self.q, self.k, self.v))
        query_weight, key_weight = (None if x is None else x.to(q.dtype) for x in (self.query_weight, self.key_weight))
        given = None
        if self.summary_keys is not None and self.summary_values is not None:
            regions = example.layout.regions
            given = Source(*(some.rows(x, regions).to(q.dtype) for x in (self.summary_keys, self.summary_values)))
        return _Run(example, options, q, k, v, query_weight, key_weight, given)


class _Combine(torch.autograd.Function):
    """One node of the graph for everything."""

    @staticmethod
    def forward(ctx: Any, examples: list[Example | None], options: Options, *tensors: Tensor | None) -> Tensor:
        inputs = Inputs(*tensors)  # pyright: ignore[reportArgumentType] - the first three are no None
        q = inputs.q
        out = torch.zeros_like(q) if _incomplete(examples, q) else torch.empty_like(q)
        wide, lse = torch.promote_types(q.dtype, torch.float32), None
        if any(example is not None and example.plan.merged for example in examples):
            lse = torch.zeros(q.shape[:3], dtype=wide, device=q.device)
        for some in groups_of(q, examples):
            run = inputs.run(some, options)
            with ExitStack() as targets:
                found = targets.enter_context(WriteTarget(out, some))
                run.forward(found, None if lse is None else targets.enter_context(WriteTarget(lse, some)))
        ctx.save_for_backward(*inputs, *((None, None) if lse is None else (out, lse)))
        ctx.examples, ctx.options = examples, options
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        inputs = Inputs(*tensors)
        make = torch.zeros_like if _incomplete(ctx.examples, inputs.q) else torch.empty_like
        grads = Inputs(
            *(make(x) for x in inputs[:3]), *(None if x is None else torch.zeros_like(x) for x in inputs[3:])
        )
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        for some in groups_of(inputs.q, ctx.examples):
            run, queries = inputs.run(some, ctx.options), None
            if lse is not None:
                queries = Queries(run.q, some.fill_up(out), some.fill_up(lse[..., None])[..., 0])
            with ExitStack() as targets:
                q, k, v = (targets.enter_context(WriteTarget(x, some)) for x in grads[:3])
                regions = some.example.layout.regions
                added = [None if x is None else targets.enter_context(WriteTarget(x, some, regions)) for x in grads[5:]]
                run.backward(some.fill_up(grad), queries, Inputs(q, k, v, *grads[3:5], *added))
        return None, None, *grads


def combine(inputs: Inputs, examples: list[Example | None], options: Options) -> Tensor:
    """The result (B, H, L, E) for prepared examples."""
    q, k, v, *others = inputs
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    return _Combine.apply(examples, options, q, k, v, *others)  # pyright: ignore[reportReturnType] - apply has no types


def _incomplete(examples: list[Example | None], q: Tensor) -> bool:
    return any(example is None or example.length < q.shape[2] for example in examples)
