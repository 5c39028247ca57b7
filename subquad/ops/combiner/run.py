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

from subquad.ops.combiner.groups import Group, WriteTarget, groups_of
from subquad.ops.combiner.layout import Example
from subquad.ops.combiner.region_rows import RegionRows
from subquad.ops.combiner.region_summary import RegionSummary
from subquad.ops.combiner.summarize import Options
from subquad.ops.combiner.weighted_rows import Averages, average_blocks, average_blocks_backward
from subquad.ops.precision import wide_dtype
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


class _Run(NamedTuple):
    """Some heads of an example.

    Attributes:
        example: what is run.
        summary: how regions are summarised.
        options: likewise, what the caller chose.
        q: (G, padded, E).
        k: likewise.
        v: likewise.
        query_weight: (E, E) or None.
        key_weight: likewise.
        given: summaries (G, R or more, E) that are made elsewhere; None where they are made here.
    """

    example: Example
    summary: RegionSummary
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
    def queries(self) -> RegionRows:
        """Those of all regions, (G, R, E)."""
        return self.summary.queries(self.q, self.query_weight, self.example, self.options)

    @property
    def keys(self) -> RegionRows | None:
        """Likewise; None where they are averages."""
        return self.summary.keys(self.k, self.key_weight, self.example, self.options)

    def own_scores(self) -> Tensor | None:
        """Of all tokens in their blocks, (G, n, m, m), where these make the summaries; None else."""
        return self.summary.own_scores(self.example.layout.blocks, self.q, self.k, self.scale)

    def summarise(self, query: Tensor, key: Tensor | None, scores: Tensor | None) -> _Summaries:
        """The summaries of all regions, with their queries, `own_scores` and, unless these are averages, keys."""
        tokens, layout = Source(self.k, self.v), self.example.layout
        made = layout.summaries
        if layout.blocks is not None:
            size, bias = layout.blocks.size, made[0].bias if made else None
            sizes = layout.blocks.sight.summaries_of_block(size), size
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
            keys, scores = self.keys, self.own_scores()
            made = self.summarise(self.queries.value(), None if keys is None else keys.value(), scores)
            summaries = Source(made.key, made.value)
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
        keys, scores = self.keys, self.own_scores()
        query, add_to_queries = self.queries.vjp()
        key, add_to_keys = (None, None) if keys is None else keys.vjp()
        made = self.summarise(query, key, scores)
        of_summaries = Source(torch.zeros_like(made.key), torch.zeros_like(made.value))
        grad_scores = scores  # the same memory: scores are read for the last time where their gradients are written
        self._attend_backward(grad, queries, Source(made.key, made.value), grads, of_summaries, scores, grad_scores)
        of_query, tokens, of_tokens = torch.zeros_like(made.query), Source(self.k, self.v), Source(grads.k, grads.v)
        if made.averages is not None:
            args = (of_summaries, made.averages, made.query, tokens, of_query, of_tokens, self.scale, grad_scores)
            average_blocks_backward(*args)
        else:
            asking = Queries(made.query, made.value, made.lse)
            for part in self.example.layout.summaries:
                part.backward(of_summaries.v, asking, {TOKENS: tokens}, of_query, {TOKENS: of_tokens}, self.scale)
        if grad_scores is None:
            add_to_queries(of_query, grads.q, grads.query_weight)
        elif self.example.layout.blocks is not None:
            self.example.layout.blocks.own_scores_backward(grad_scores, self.q, self.k, grads.q, grads.k, self.scale)
        if add_to_keys is not None:
            add_to_keys(of_summaries.k, grads.k, grads.key_weight)

    def _attend_backward(
        self,
        grad: Tensor,
        queries: Queries | None,
        summaries: Source,
        grads: Inputs,
        of_summaries: Source,
        scores: Tensor | None = None,
        grad_scores: Tensor | None = None,
    ) -> None:
        sources = {TOKENS: Source(self.k, self.v), SUMMARIES: summaries}
        added = {TOKENS: Source(grads.k, grads.v), SUMMARIES: of_summaries}
        if self.example.layout.blocks is not None:
            args = (grad, self.q, sources, grads.q, added, self.scale, scores, grad_scores)
            self.example.layout.blocks.backward(*args)
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

    def run(self, some: Group, summary: RegionSummary, options: Options) -> _Run:
        """Some heads, float32 or wider."""
        example = some.example
        q, k, v = (some.fill_up(x) for x in (self.q, self.k, self.v))
        query_weight, key_weight = (None if x is None else x.to(q.dtype) for x in (self.query_weight, self.key_weight))
        given = None
        if self.summary_keys is not None and self.summary_values is not None:
            regions = example.layout.regions
            given = Source(*(some.rows(x, regions).to(q.dtype) for x in (self.summary_keys, self.summary_values)))
        return _Run(example, summary, options, q, k, v, query_weight, key_weight, given)


class _Combine(torch.autograd.Function):
    """One node of the graph for everything."""

    @staticmethod
    def forward(
        ctx: Any, examples: list[Example | None], summary: RegionSummary, options: Options, *tensors: Tensor | None
    ) -> Tensor:
        inputs = Inputs(*tensors)  # pyright: ignore[reportArgumentType] - the first three are no None
        q = inputs.q
        out = torch.zeros_like(q) if _incomplete(examples, q) else torch.empty_like(q)
        wide, lse = wide_dtype(q), None
        if any(example is not None and example.layout.parts for example in examples):
            lse = torch.zeros(q.shape[:3], dtype=wide, device=q.device)
        for some in groups_of(q, examples):
            run = inputs.run(some, summary, options)
            with ExitStack() as targets:
                found = targets.enter_context(WriteTarget(out, some))
                run.forward(found, None if lse is None else targets.enter_context(WriteTarget(lse, some)))
        ctx.save_for_backward(*inputs, *((None, None) if lse is None else (out, lse)))
        ctx.examples, ctx.summary, ctx.options = examples, summary, options
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
            run, queries = inputs.run(some, ctx.summary, ctx.options), None
            if lse is not None:
                queries = Queries(run.q, some.fill_up(out), some.fill_up(lse[..., None])[..., 0])
            with ExitStack() as targets:
                q, k, v = (targets.enter_context(WriteTarget(x, some)) for x in grads[:3])
                regions = some.example.layout.regions
                added = [None if x is None else targets.enter_context(WriteTarget(x, some, regions)) for x in grads[5:]]
                run.backward(some.fill_up(grad), queries, Inputs(q, k, v, *grads[3:5], *added))
        return None, None, None, *grads


def combine(inputs: Inputs, examples: list[Example | None], summary: RegionSummary, options: Options) -> Tensor:
    """The result (B, H, L, E) for prepared examples."""
    q, k, v, *others = inputs
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    tensors = q, k, v, *others
    return _Combine.apply(examples, summary, options, *tensors)  # pyright: ignore[reportReturnType] - apply has no types


def _incomplete(examples: list[Example | None], q: Tensor) -> bool:
    return any(example is None or example.length < q.shape[2] for example in examples)
