"""The order of tokens by bucket in every round, and the tiles of sorted tokens that hold the lists of `lists`.

Every chunk of queries attends to a stretch of the order that holds its list. Where the list is not the whole stretch,
codes tell: numbers in the sorted order that grow by 1 from chunk to chunk and by 2 more from bucket to bucket, so that
j is on i's list if and only if code_i - code_j is 0 or 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.lsh.lists import ListRule
from subquad.ops.piece import CALL_BYTES, Bias, make_bias, stack

NO_QUERY, NO_KEY = -(2**29), -(2**30)
"""Codes of slots that hold no token."""


class Order(NamedTuple):
    """The order of the tokens in every round.

    Attributes:
        tokens: int32 (B, H, rounds, L), the token at every place, invalid ones last.
        codes: int32 (B, H, rounds, L), by place; None where tiles alone make the lists.
        counts: number of valid tokens of each example.
    """

    tokens: Tensor
    codes: Tensor | None
    counts: list[int]


class Round(NamedTuple):
    """One round of one head.

    Attributes:
        slots: int32 (S,), the token of each slot; in a slot that holds none any token stands in.
        first: slot of the first query.
        rows: slots of queries.
        place: int64 (L,), place of each token, the number of valid ones or more for an invalid one.
        query_codes: int32 (K, rows); the first row makes the list, the others tell how often a token is listed.
        key_codes: int32 (K, S); K = 0 where tiles alone make the list.
    """

    slots: Tensor
    first: int
    rows: int
    place: Tensor
    query_codes: Tensor
    key_codes: Tensor

    @property
    def plain(self) -> bool:
        """Whether tiles alone make the list."""
        return not len(self.key_codes)


class Call(NamedTuple):
    """Chunks that are attended from together, each a chunk further than the one before.

    Attributes:
        row: the first query.
        rows: queries of a chunk.
        column: slot of the first key.
        columns: keys of a chunk.
        number: how many chunks.
        bias: which keys are on whose list, and minus the logarithm of how often.
    """

    row: int
    rows: int
    column: int
    columns: int
    number: int
    bias: Bias


def sort_by_bucket(buckets: Tensor, rule: ListRule, valid: Tensor | None) -> Order:
    """Sort by (bucket, position), invalid tokens last: in one dimension, for which torch has a faster sort."""
    *rows, length = buckets.shape
    counts = [length] * rows[0] if valid is None else valid.sum(dim=1).tolist()
    above = int(buckets.max()) + 1 if buckets.numel() else 1
    keys = buckets if valid is None else buckets.masked_fill(~valid[:, None, None], above)
    keys = keys.flatten(0, 2)
    row = torch.arange(len(keys), device=keys.device)[:, None]
    in_order, index = (keys + row * (above + 1)).flatten().sort(stable=True)
    tokens = (index.view_as(keys) - row * length).int().view(*rows, length)
    if not (rule.per_bucket or rule.same_bucket_only or rule.dedup or rule.wrap):
        return Order(tokens, None, counts)
    return Order(tokens, _codes(in_order.view(*rows, length), rule), counts)


def _codes(buckets: Tensor, rule: ListRule) -> Tensor:
    """The codes of sorted buckets (B, H, rounds, L); they begin with 0."""
    place = torch.arange(buckets.shape[-1], device=buckets.device)
    opens = torch.zeros_like(buckets, dtype=torch.bool)
    opens[..., 1:] = buckets[..., 1:] != buckets[..., :-1]
    if rule.per_bucket:
        place = place - torch.where(opens, place, 0).cummax(dim=-1).values
    steps = (place % rule.chunk == 0).int() + (2 * opens.int() if rule.per_bucket or rule.same_bucket_only else 0)
    codes = steps.expand_as(buckets).cumsum(dim=-1, dtype=torch.int32)
    return codes - codes[..., :1]


class Rounds:
    """The rounds of every head, and the calls of the fused operator that make them up."""

    def __init__(self, order: Order, rule: ListRule, dtype: torch.dtype) -> None:
        self.order, self.rule, self.dtype = order, rule, dtype
        tokens = order.tokens.long()
        places = torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)
        self.place = torch.empty_like(tokens).scatter_(-1, tokens, places)
        self.biases: dict[tuple[int, int], Bias] = {}

    def of_head(self, example: int, head: int) -> Iterator[Round]:
        """The rounds of one head."""
        count, size, rule = self.order.counts[example], self.rule.chunk, self.rule
        tokens, place = self.order.tokens[example, head], self.place[example, head]
        if self.order.codes is None:
            nothing = tokens.new_empty(0, 0)
            for index in range(len(tokens)):
                yield Round(tokens[index, :count], 0, count, place[index], nothing, nothing)
            return
        codes = self.order.codes[example, head]
        first, rows = (2 if rule.per_bucket else 1) * size, -(-count // size) * size
        behind = size if rule.per_bucket and not rule.causal else 0
        by_token = codes.gather(1, place) if rule.dedup else codes[:0]
        looked_back = self._looked_back(place.roll(1, dims=0), count) if rule.dedup and rule.wrap else codes[:0]
        for index in range(len(tokens)):
            slots = tokens[index, :1].repeat(first + rows + behind)
            own = torch.full_like(slots, NO_KEY)
            slots[first : first + count] = tokens[index, :count]
            own[first : first + count] = codes[index, :count]
            if rule.wrap:
                last = tokens[index - 1, rows - size : count]
                slots[first - len(last) : first] = last
                own[first - len(last) : first] = -1
            queries = own[first : first + rows]
            queries = queries.masked_fill(queries == NO_KEY, NO_QUERY)
            listed = slots[first : first + rows]
            of_queries = (queries[None], by_token[:, listed], by_token[: len(looked_back), listed])
            of_keys = (own[None], by_token[:, slots], looked_back[:, slots])
            yield Round(slots, first, rows, place[index], torch.cat(of_queries), torch.cat(of_keys))

    def _looked_back(self, place: Tensor, count: int) -> Tensor:
        """Codes that put the last chunk of the round before on the lists of a first chunk: (rounds, L)."""
        last = (place // self.rule.chunk == (count - 1) // self.rule.chunk) & (place < count)
        return torch.where(last, -1, NO_KEY).int()

    def calls(self, this: Round, width: int) -> Iterator[Call]:
        """The calls of a round of heads of a width, none with temporaries that leave the cache."""
        size = self.rule.chunk
        if not this.plain:
            columns = len(this.slots) - this.rows + size
            elements = (size + 2 * columns) * width + (1 + len(this.key_codes)) * size * columns
            step = max(1, CALL_BYTES // (elements * self.dtype.itemsize))
            for chunk in range(0, this.rows // size, step):
                number = min(step, this.rows // size - chunk)
                bias = self._bias_of_codes(this, chunk, number, columns)
                yield Call(chunk * size, size, chunk * size, columns, number, bias)
            return
        chunks, rest = divmod(this.rows, size)
        yield self._call(0, min(size, this.rows), 0, min(size, this.rows), 1)
        step = max(1, 2 * CALL_BYTES // (5 * size * width * self.dtype.itemsize))
        for chunk in range(1, chunks, step):
            yield self._call(chunk * size, size, (chunk - 1) * size, 2 * size, min(step, chunks - chunk))
        if chunks and rest:
            yield self._call(chunks * size, rest, (chunks - 1) * size, size + rest, 1)

    def _call(self, row: int, rows: int, column: int, columns: int, number: int) -> Call:
        """A call in which everything but the query itself is listed; queries are the last of the keys."""
        if (rows, columns) not in self.biases:
            visible = ~torch.eye(columns, dtype=torch.bool, device=self.place.device)[columns - rows :]
            self.biases[rows, columns] = make_bias(visible[None, None], self.dtype)
        return Call(row, rows, column, columns, number, self.biases[rows, columns])

    def _bias_of_codes(self, this: Round, chunk: int, number: int, columns: int) -> Bias:
        """The bias of some chunks, (number, 1, chunk, columns)."""
        size, device = self.rule.chunk, self.place.device
        queries = this.query_codes[:, chunk * size : (chunk + number) * size].unflatten(1, (number, size))[..., None]
        keys = stack(this.key_codes, chunk * size, columns, number, size).transpose(0, 1)[..., None, :]
        row = torch.arange(this.first, this.first + size, device=device)[:, None]
        column = torch.arange(columns, device=device)
        visible = _listed(queries[0], keys[0]) & (column < row if self.rule.causal else column != row)
        if self.rule.wrap:  # the chunk that is looked back at may hold the query too
            tokens = stack(this.slots[None], chunk * size, columns, number, size)[:, 0]
            visible = visible & (tokens[:, this.first : this.first + size, None] != tokens[:, None, :])
        bias = make_bias(visible[:, None], self.dtype)
        if not self.rule.dedup:
            return bias
        times = sum(_listed(*pair).to(self.dtype) for pair in zip(queries[1:], keys[1:], strict=True))
        return bias._replace(values=bias.values - torch.as_tensor(times).clamp_min(1).log()[:, None])


def _listed(queries: Tensor, keys: Tensor) -> Tensor:
    """Whether codes differ by 0 or 1."""
    return (queries - keys).bitwise_and(-2) == 0
