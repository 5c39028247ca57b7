"""Softmax attention as a list of parts, each a batch of equal rectangles of queries and keys.

The rows of a part are views of one tensor, its keys views of one tensor or of several side by side: tokens, and
summaries that stand for regions of tokens. Parts of the same rows are merged by their log-sum-exp; the merged result
and log-sum-exp give every part its exact share of the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.fused import fused_backward, fused_forward
from subquad.ops.partial_softmax import CALL_BYTES, merge

TOKENS, SUMMARIES = "tokens", "summaries"


@dataclass(frozen=True)
class View:
    """Rows first + n step + t stride of a sequence, for n < count and t < size; with step 0 all n see the same rows."""

    first: int
    count: int
    step: int
    size: int
    stride: int = 1

    def of(self, x: Tensor) -> Tensor:
        """(G, rows, ...) -> (count, G, size, ...), a view."""
        sequence, position, *rest = x.stride()
        shape = (self.count, x.shape[0], self.size, *x.shape[2:])
        strides = (self.step * position, sequence, self.stride * position, *rest)
        return x.as_strided(shape, strides, x.storage_offset() + self.first * position)

    def add(self, target: Tensor, parts: Tensor) -> None:
        """Add (count, G, size, E) to the rows of (G, rows, E)."""
        if self.step == 0 and self.count > 1:
            replace(self, count=1).of(target).add_(parts.sum(dim=0, keepdim=True))
        else:
            self.of(target).add_(parts)

    def write(self, target: Tensor, parts: Tensor) -> None:
        """Overwrite rows of (G, rows, E), all of which differ."""
        self.of(target).copy_(parts)

    def cut(self, start: int, stop: int) -> View:
        """The views start..stop-1."""
        return replace(self, first=self.first + start * self.step, count=min(stop, self.count) - start)


@dataclass(frozen=True)
class Gather:
    """Listed rows of a sequence.

    Attributes:
        index: int64 (count, size).
    """

    index: Tensor

    @property
    def size(self) -> int:
        """Rows of each list."""
        return self.index.shape[1]

    def of(self, x: Tensor) -> Tensor:
        """(G, rows, ...) -> (count, G, size, ...), a copy."""
        return x[:, self.index].transpose(0, 1)

    def add(self, target: Tensor, parts: Tensor) -> None:
        """Add (count, G, size, E) to the rows of (G, rows, E), which may be listed several times."""
        target.index_add_(1, self.index.flatten(), parts.transpose(0, 1).flatten(1, 2))

    def write(self, target: Tensor, parts: Tensor) -> None:
        """Overwrite rows of (G, rows, E), all of which differ."""
        target.index_copy_(1, self.index.flatten(), parts.transpose(0, 1).flatten(1, 2))

    def cut(self, start: int, stop: int) -> Gather:
        """The lists start..stop-1."""
        return Gather(self.index[start:stop])


class Keys(NamedTuple):
    """Keys of a part, or some of them.

    Attributes:
        origin: `TOKENS` or `SUMMARIES`.
        rows: which of them.
    """

    origin: str
    rows: View | Gather


class Source(NamedTuple):
    """Keys and values, or their gradients.

    Attributes:
        k: (G, rows, E).
        v: (G, rows, E).
    """

    k: Tensor
    v: Tensor


Sources = Mapping[str, Source]


class Queries(NamedTuple):
    """The queries of parts and what they found.

    Attributes:
        q: (G, rows, E).
        out: (G, rows, E).
        lse: (G, rows), -inf where nothing was seen; finite in the backward pass.
    """

    q: Tensor
    out: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Part:
    """Rectangles of one shape.

    Attributes:
        rows: queries.
        keys: key columns, side by side.
        visible: bool (count or 1, 1, rows or 1, columns); None where everything is.
        causal: row t sees the columns 0..t; excludes `visible`.
        bias: what is added to the scores, broadcast likewise; None for nothing. Made of the others by `restrict`.
    """

    rows: View
    keys: tuple[Keys, ...]
    visible: Tensor | None = None
    causal: bool = False
    bias: Tensor | None = None

    @property
    def columns(self) -> int:
        """Keys of each rectangle."""
        return sum(keys.rows.size for keys in self.keys)

    @property
    def pairs(self) -> int:
        """Visible pairs."""
        rows, columns = self.rows.size, self.columns
        if self.causal:
            return self.rows.count * int(torch.ones(rows, columns, dtype=torch.bool).tril().sum())
        if self.visible is None:
            return self.rows.count * rows * columns
        return int(self.visible.expand(self.rows.count, 1, rows, columns).sum())

    def restrict(self, added: Mapping[str, Tensor], dtype: torch.dtype) -> Part:
        """Make the bias: what is hidden by shape, and what is `added` to every key (rows,) of an origin, 0 or -inf."""
        known = [keys.rows.of(added[keys.origin][None]) if keys.origin in added else None for keys in self.keys]
        if all(of_keys is None for of_keys in known):
            return self if self.visible is None else replace(self, bias=_hide(self.visible, dtype))
        count, rows = self.rows.count, self.rows.size
        columns = torch.cat(
            [
                torch.zeros(count, 1, keys.rows.size, dtype=dtype) if of_keys is None else of_keys.to(dtype)
                for keys, of_keys in zip(self.keys, known, strict=True)
            ],
            dim=2,
        )[:, :, None]
        visible = torch.ones(rows, self.columns, dtype=torch.bool).tril()[None, None] if self.causal else self.visible
        bias = columns if visible is None else columns + _hide(visible.to(columns.device), dtype)
        return replace(self, bias=bias, causal=False)

    def forward(self, queries: Queries, sources: Sources, scale: float, *, fresh: bool) -> None:
        """Merge this part into the result; write it where it is the first of its rows."""
        for part in self._cuts(queries.q):
            k, v = part._columns(sources)
            found, lse = fused_forward(part.rows.of(queries.q), k, v, scale, part.bias, causal=self.causal)
            if part.bias is not None:
                hidden = (part.bias == -torch.inf).all(dim=-1)
                lse = lse.masked_fill(hidden, -torch.inf)
            merge(part.rows.of(queries.out), part.rows.of(queries.lse), found, lse, fresh=fresh)

    def backward(
        self,
        grad: Tensor,
        queries: Queries,
        sources: Sources,
        grad_q: Tensor,
        grads: Sources,
        scale: float,
        *,
        fresh: bool = False,
    ) -> None:
        """Add this part's share of the gradients; write those of tokens where it is the first and has all of them.

        `grad` (G, rows, E) is the gradient of the merged result.
        """
        for part in self._cuts(queries.q):
            k, v = part._columns(sources)
            q, out, lse, upstream = (part.rows.of(x) for x in (*queries, grad))
            of_q, of_k, of_v = fused_backward(upstream, q, k, v, out, lse, scale, part.bias, causal=self.causal)
            (part.rows.write if fresh else part.rows.add)(grad_q, of_q)
            sizes = [keys.rows.size for keys in part.keys]
            for keys, more_k, more_v in zip(part.keys, of_k.split(sizes, 2), of_v.split(sizes, 2), strict=True):
                first = fresh and keys.origin == TOKENS
                add = keys.rows.write if first else keys.rows.add
                add(grads[keys.origin].k, more_k)
                add(grads[keys.origin].v, more_v)

    def _columns(self, sources: Sources) -> tuple[Tensor, Tensor]:
        """Keys and values (count, G, columns, E)."""
        pairs = [(keys.rows.of(sources[keys.origin].k), keys.rows.of(sources[keys.origin].v)) for keys in self.keys]
        if len(pairs) == 1:
            return pairs[0]
        return torch.cat([k for k, _ in pairs], dim=2), torch.cat([v for _, v in pairs], dim=2)

    def _cuts(self, like: Tensor) -> Iterator[Part]:
        """The part in pieces whose temporaries stay in the cache."""
        elements = (self.rows.size + 2 * self.columns) * like.shape[-1] * like.shape[0]
        if self.bias is not None and self.bias.shape[2] > 1:
            elements += self.rows.size * self.columns
        yield from self.cuts(max(1, CALL_BYTES // (elements * like.element_size())))

    def cuts(self, size: int) -> Iterator[Part]:
        """The part in pieces of equal numbers of rectangles, at most `size`."""
        count = self.rows.count
        size = math.ceil(count / math.ceil(count / size))
        for start in range(0, count, size):
            stop, bias = start + size, self.bias
            keys = tuple(Keys(keys.origin, keys.rows.cut(start, stop)) for keys in self.keys)
            bias = bias[start:stop] if bias is not None and bias.shape[0] > 1 else bias
            yield replace(self, rows=self.rows.cut(start, stop), keys=keys, bias=bias)


def _hide(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
