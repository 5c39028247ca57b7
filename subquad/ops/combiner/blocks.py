"""Blocks of queries over their own tokens and over summaries of other blocks, in one table of scores.

Plain matrix products on whole blocks, whose results go straight to their places: of short rectangles the fused operator
makes smaller products, and its results would have to be copied and merged. Nothing of a softmax is kept: the table is
made again in the backward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subquad.ops.combiner.block_products import in_blocks, multiply
from subquad.ops.partial_softmax import CALL_BYTES
from subquad.ops.rectangles import SUMMARIES, TOKENS, Source, Sources


class Sight(ABC):
    """Which summaries the queries of a block see: rectangles of some of the queries with some of the summaries."""

    @abstractmethod
    def summaries_of_block(self, size: int) -> int:
        """How many a block of `size` tokens has."""

    @abstractmethod
    def queries(self, x: Tensor) -> Tensor:
        """(G, c, m, ...) -> (G, rectangles, rows, ...), a view."""

    @abstractmethod
    def summaries(self, x: Tensor, size: int) -> Tensor:
        """(G, R, ...) -> (G, rectangles, columns, ...), a view; `size` is m."""

    @abstractmethod
    def products(self, rows: Tensor, tokens: Tensor, summaries: Tensor, factor: float) -> Tensor:
        """Rows (G, c, m, E) with tokens of their block and, as `summaries` has them, summaries: (G, c, m, columns)."""

    def beside(self, own: Tensor, rows: Tensor, summaries: Tensor, factor: float) -> Tensor:
        """`products` where those with tokens, (G, c, m, m), are there already."""
        size = own.shape[3]
        found = own.new_empty(*own.shape[:3], size + summaries.shape[2])
        found[..., :size] = own
        multiply(self.queries(found[..., size:]), self.queries(rows), summaries.mT, factor)
        return found


class Shared(Sight):
    """One summary for each block, which all queries of another block see."""

    def summaries_of_block(self, size: int) -> int:
        """One."""
        del size
        return 1

    def queries(self, x: Tensor) -> Tensor:
        """All rows together."""
        return x.flatten(1, 2)[:, None]

    def summaries(self, x: Tensor, size: int) -> Tensor:
        """One set."""
        return x[:, None]

    def products(self, rows: Tensor, tokens: Tensor, summaries: Tensor, factor: float) -> Tensor:
        """In one: columns are copied, which are fewer numbers than the products."""
        columns = torch.cat((tokens, summaries.expand(-1, tokens.shape[1], -1, -1)), dim=2)
        found = rows.new_empty(*rows.shape[:3], columns.shape[2])
        multiply(found, rows, columns.mT, factor)
        return found


class ByPlace(Sight):
    """One summary for each token, which the queries at the same place in other blocks see."""

    def summaries_of_block(self, size: int) -> int:
        """One a place."""
        return size

    def queries(self, x: Tensor) -> Tensor:
        """A place at a time."""
        return x.transpose(1, 2)

    def summaries(self, x: Tensor, size: int) -> Tensor:
        """A place at a time."""
        return x.unflatten(1, (-1, size)).transpose(1, 2)

    def products(self, rows: Tensor, tokens: Tensor, summaries: Tensor, factor: float) -> Tensor:
        """In two, side by side."""
        own = rows.new_empty(*rows.shape[:3], tokens.shape[2])
        multiply(own, rows, tokens.mT, factor)
        return self.beside(own, rows, summaries, factor)


@dataclass(frozen=True)
class Blocks:
    """Blocks of queries, each over its own tokens and the summaries of other blocks.

    Attributes:
        count: n, blocks.
        size: m, tokens of a block.
        causal: own tokens up to the query and the blocks before, instead of all.
        sight: which of the summaries of a block a query sees.
        tokens: what is added to the scores of own tokens, broadcastable to (n, m, m); None for nothing.
        summaries: likewise of summaries, to (n, m, blocks that have summaries). Both are made by `restrict`.
    """

    count: int
    size: int
    causal: bool
    sight: Sight
    tokens: Tensor | None = None
    summaries: Tensor | None = None

    @property
    def summarised(self) -> int:
        """How many blocks somebody sees from outside."""
        return self.count - 1 if self.causal or self.count == 1 else self.count

    @property
    def columns(self) -> int:
        """Columns of the table, at most."""
        return self.size + self.summarised

    @property
    def pairs(self) -> int:
        """Visible pairs."""
        others, own = self.count * (self.count - 1), self.size**2
        if self.causal:
            others, own = others // 2, self.size * (self.size + 1) // 2
        return self.count * own + others * self.size

    def restrict(self, added: Mapping[str, Tensor], dtype: torch.dtype) -> Blocks:
        """Make what is added: for what is hidden by shape, and what is `added` to every key (rows,) of an origin.

        What is hidden gets a finite number, so that a query may see nothing: what it finds then means nothing.
        """
        hidden, size, block = torch.finfo(dtype).min / 4, self.size, torch.arange(self.count)
        tokens = torch.full((size, size), hidden, dtype=dtype).triu(diagonal=1)[None] if self.causal else None
        if TOKENS in added:
            of_tokens = added[TOKENS].clamp_min(hidden).view(self.count, 1, size)
            tokens = of_tokens if tokens is None else tokens + of_tokens
        other = block[: self.summarised]
        seen = other < block[:, None] if self.causal else other != block[:, None]
        summaries = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, hidden)[:, None]
        if SUMMARIES in added:
            of_summaries = added[SUMMARIES].clamp_min(hidden)[None, :, None]
            summaries = summaries + self.sight.summaries(of_summaries, size)[..., 0]
        return replace(self, tokens=tokens, summaries=summaries)

    def own_scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Scores of all tokens of each block, before anything is hidden: (G, n, m, m)."""
        found = q.new_empty(q.shape[0], self.count, self.size, self.size)
        multiply(found, in_blocks(q, 0, self.count, self.size), in_blocks(k, 0, self.count, self.size).mT, scale)
        return found

    def own_scores_backward(
        self, grad_scores: Tensor, q: Tensor, k: Tensor, grad_q: Tensor, grad_k: Tensor, scale: float
    ) -> None:
        """Add the gradients of queries and keys from those of `own_scores`."""
        queries, keys, of_q, of_k = (in_blocks(x, 0, self.count, self.size) for x in (q, k, grad_q, grad_k))
        multiply(of_q, grad_scores, keys, scale, add=True)
        multiply(of_k, grad_scores.mT, queries, scale, add=True)

    def forward(self, q: Tensor, sources: Sources, out: Tensor, scale: float, scores: Tensor | None) -> None:
        """Write what the queries (G, L, E) find; `scores` are `own_scores`, where these are there already."""
        for part in self._parts(q):
            v, of_queries = part.of(sources[TOKENS].v), part.of(q)
            keys, values = (part.seen(x) for x in sources[SUMMARIES])
            weights = part.weights(of_queries, part.of(sources[TOKENS].k), keys, scale, scores)
            found = part.of(out)
            multiply(found, weights[..., : self.size], v)
            of_summaries = self.sight.queries(weights[..., self.size :])
            multiply(self.sight.queries(found), of_summaries, values, add=True)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        sources: Sources,
        grad_q: Tensor,
        grads: Sources,
        scale: float,
        scores: Tensor | None,
        grad_scores: Tensor | None,
    ) -> None:
        """Write the gradients of queries and tokens, and add those of summaries.

        Args:
            grad: of the result, (G, L, E).
            q: (G, L, E).
            sources: tokens and summaries.
            grad_q: (G, L, E).
            grads: of the sources.
            scale: factor of the scores.
            scores: `own_scores`, where these are there already.
            grad_scores: where their gradients are written then, and no further; may be the memory of `scores`, of which
                each part is read before it is written.
        """
        rows = self.sight.queries
        for part in self._parts(q):
            upstream, of_queries, of_q = part.of(grad), part.of(q), part.of(grad_q)
            own, others = Source(*map(part.of, sources[TOKENS])), Source(*map(part.seen, sources[SUMMARIES]))
            of_own, of_others = Source(*map(part.of, grads[TOKENS])), Source(*map(part.seen, grads[SUMMARIES]))
            weights = part.weights(of_queries, own.k, others.k, scale, scores)
            of_scores = self.sight.products(upstream, own.v, others.v, 1.0)
            softmax_backward = torch.ops.aten._softmax_backward_data.out
            softmax_backward(of_scores, weights, -1, weights.dtype, grad_input=of_scores)
            by_tokens, by_summaries = of_scores[..., : self.size], rows(of_scores[..., self.size :])
            multiply(of_own.v, weights[..., : self.size].mT, upstream)
            multiply(of_others.v, rows(weights[..., self.size :]).mT, rows(upstream), add=True)
            multiply(of_others.k, by_summaries.mT, rows(of_queries), scale, add=True)
            if grad_scores is None:
                multiply(of_own.k, by_tokens.mT, of_queries, scale)
                multiply(of_q, by_tokens, own.k, scale)
            else:
                part.of_table(grad_scores).copy_(by_tokens)
                of_own.k.zero_()
            multiply(rows(of_q), by_summaries, others.k, scale, add=grad_scores is None)

    def _parts(self, like: Tensor) -> Iterator[_Part]:
        """Blocks whose tables stay in the cache, with the summaries that some of them see."""
        size = max(1, CALL_BYTES // (like.shape[0] * self.size * self.columns * like.element_size()))
        for start in range(0, self.count, size):
            stop = min(start + size, self.count)
            yield _Part(self, start, stop, min(self.summarised, stop - 1) if self.causal else self.summarised)


@dataclass(frozen=True)
class _Part:
    """The blocks start..stop-1, and the summaries of the first `seen_blocks` blocks."""

    blocks: Blocks
    start: int
    stop: int
    seen_blocks: int

    def of(self, x: Tensor) -> Tensor:
        """(G, L, E) -> (G, c, m, E)."""
        return in_blocks(x, self.start, self.stop, self.blocks.size)

    def of_table(self, x: Tensor) -> Tensor:
        """(G, n, m, m) -> (G, c, m, m)."""
        return x[:, self.start : self.stop]

    def seen(self, x: Tensor) -> Tensor:
        """Summaries (G, R, E) -> (G, rectangles, columns, E)."""
        whole = self.blocks.sight.summaries(x, self.blocks.size)
        return whole[:, :, : self.seen_blocks]

    def weights(self, q: Tensor, k: Tensor, keys: Tensor, scale: float, own: Tensor | None) -> Tensor:
        """The softmax of the scores, (G, c, m, columns); `own` (G, n, m, m) are those of all blocks."""
        blocks, size, sight = self.blocks, self.blocks.size, self.blocks.sight
        scores = sight.products(q, k, keys, scale) if own is None else sight.beside(self.of_table(own), q, keys, scale)
        for some, bias in ((scores[..., :size], blocks.tokens), (scores[..., size:], blocks.summaries)):
            if bias is not None:
                bias = bias[self.start : self.stop] if len(bias) > 1 else bias
                some += bias[..., : some.shape[-1]]
        return torch.softmax(scores, dim=-1, out=scores)
