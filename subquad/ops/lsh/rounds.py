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
from subquad.ops.partial_softmax import CALL_BYTES, Bias, make_bias, stack

NO_QUERY, NO_KEY = -(2**29), -(2**30)
"""Codes of slots that hold no token."""

GROUP_BYTES = 2**20
"""Vectors of the heads that are worked on together: they stay in the cache, and are many where sequences are short."""


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


class Group(NamedTuple):
    """Heads of examples that are worked on together, G of them.

    Attributes:
        where: examples and heads.
        counts: int64 (G, 1), number of valid tokens.
        largest: the largest count.
        equal: whether all counts are.
    """

    where: tuple[slice, slice]
    counts: Tensor
    largest: int
    equal: bool


class Round(NamedTuple):
    """One round of a group; its vectors (G * L, E) stand one sequence behind the other.

    Attributes:
        slots: int64 (G, S), the vector of each slot; in a slot that holds none any of the sequence stands in.
        first: slot of the first query.
        rows: slots of queries.
        place: int64 (G * L,), where each token's query is among (G, rows + 1); an invalid token's is the last of its G.
        query_codes: int32 (K, G, rows); the first row makes the list, the others tell how often a token is listed.
        key_codes: int32 (K, G, S); K = 0 where tiles alone make the list.
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
    buckets = buckets[:, :, : rule.different_rounds(*buckets.shape[2:])]
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

    def groups(self, width: int) -> Iterator[Group]:
        """Groups of the heads that have a valid token, of vectors of a width."""
        batch, num_heads, _, length = self.order.tokens.shape
        most = max(1, GROUP_BYTES // max(1, length * width * self.dtype.itemsize))
        examples, heads = max(1, most // num_heads), min(num_heads, most)
        for example in range(0, batch, examples):
            counts = self.order.counts[example : example + examples]
            if not max(counts):
                continue
            for head in range(0, num_heads, heads):
                size = min(heads, num_heads - head)
                of_each = torch.tensor(counts, device=self.place.device).repeat_interleave(size)[:, None]
                where = slice(example, example + examples), slice(head, head + size)
                yield Group(where, of_each, max(counts), min(counts) == max(counts))

    def of_group(self, group: Group) -> Iterator[Round]:
        """The rounds of a group."""
        tokens, place = (x[group.where].flatten(0, 1).transpose(0, 1) for x in (self.order.tokens, self.place))
        begin = torch.arange(tokens.shape[1], device=tokens.device)[:, None]
        tokens = tokens.long() + begin * tokens.shape[2]
        rows = group.largest
        if self.order.codes is None and group.equal:
            nothing = tokens.new_empty(0, 0, 0)
            for own, target in zip(tokens, place, strict=True):
                target = target.clamp_max(rows) + begin * (rows + 1)
                yield Round(own[:, :rows], 0, rows, target.flatten(), nothing, nothing)
            return
        rows = -(-rows // self.rule.chunk) * self.rule.chunk
        for index, (slots, queries, keys) in enumerate(self._coded(group, tokens, place, rows)):
            first = slots.shape[1] - rows - self._behind(rows)
            target = place[index].masked_fill(place[index] >= group.counts, rows) + begin * (rows + 1)
            yield Round(slots, first, rows, target.flatten(), queries, keys)

    def _coded(self, group: Group, tokens: Tensor, place: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Slots and codes of queries and keys of each round; tokens and place: int64 (rounds, G, L)."""
        size, rule, count = self.rule.chunk, self.rule, group.largest
        codes = self._codes_of(group, tokens)
        first, behind = self._before(rows), self._behind(rows)
        by_token = codes.gather(2, place) if rule.dedup else codes[:0]
        looked_back = self._looked_back(place.roll(1, dims=0), group.counts) if rule.dedup and rule.wrap else codes[:0]
        hidden = torch.arange(count, device=tokens.device) >= group.counts
        for index, (in_order, of_places) in enumerate(zip(tokens, codes, strict=True)):
            slots = in_order[:, :1].repeat(1, first + rows + behind)
            own = torch.full_like(slots, NO_KEY, dtype=torch.int32)
            slots[:, first : first + count] = in_order[:, :count]
            own[:, first : first + count] = of_places[:, :count].masked_fill(hidden, NO_KEY)
            if rule.wrap:
                last = (group.counts - 1) // size * size + torch.arange(size, device=tokens.device)
                slots[:, :first] = tokens[index - 1].gather(1, last.clamp(0, tokens.shape[2] - 1))
                own[:, :first] = torch.where((last >= 0) & (last < group.counts), -1, NO_KEY)
            queries, listed = own[:, first : first + rows], slots[:, first : first + rows]
            queries = queries.masked_fill(queries == NO_KEY, NO_QUERY)
            of_queries = (queries[None], _at(by_token, listed), _at(by_token[: len(looked_back)], listed))
            of_keys = (own[None], _at(by_token, slots), _at(looked_back, slots))
            yield slots, torch.cat(of_queries), torch.cat(of_keys)

    def _codes_of(self, group: Group, tokens: Tensor) -> Tensor:
        """Codes of a group by place, (rounds, G, L); where tiles alone make the lists, they tell chunks apart."""
        if self.order.codes is not None:
            return self.order.codes[group.where].flatten(0, 1).transpose(0, 1)
        chunks = torch.arange(tokens.shape[2], dtype=torch.int32, device=tokens.device) // self.rule.chunk
        return chunks.expand_as(tokens)

    def _before(self, rows: int) -> int:
        """Slots in front of the queries, for what the first of a call's chunks look back at."""
        others = 1 if self.rule.wrap else rows // self.rule.chunk - 1
        return min(2 if self.rule.per_bucket else 1, others) * self.rule.chunk

    def _behind(self, rows: int) -> int:
        """Slots behind the queries, for chunks inside buckets that begin between the borders of tiles."""
        return self.rule.chunk if self.rule.per_bucket and not self.rule.causal and rows > self.rule.chunk else 0

    def _looked_back(self, place: Tensor, counts: Tensor) -> Tensor:
        """Codes that put the last chunk of the round before on the lists of a first chunk: (rounds, G, L)."""
        last = (place // self.rule.chunk == (counts - 1) // self.rule.chunk) & (place < counts)
        return torch.where(last, -1, NO_KEY).int()

    def calls(self, this: Round, width: int) -> Iterator[Call]:
        """The calls of a round of heads of a width, none with temporaries that leave the cache."""
        size = self.rule.chunk
        if not this.plain:
            columns = this.slots.shape[1] - this.rows + size
            elements = len(this.slots) * ((size + 2 * columns) * width + (1 + len(this.key_codes)) * size * columns)
            step = max(1, CALL_BYTES // (elements * self.dtype.itemsize))
            for chunk in range(0, this.rows // size, step):
                number = min(step, this.rows // size - chunk)
                bias = self._bias_of_codes(this, chunk, number, columns)
                yield Call(chunk * size, size, chunk * size, columns, number, bias)
            return
        chunks, rest = divmod(this.rows, size)
        yield self._call(0, min(size, this.rows), 0, min(size, this.rows), 1)
        step = max(1, 2 * CALL_BYTES // (5 * len(this.slots) * size * width * self.dtype.itemsize))
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
        """The bias of some chunks, (number, G, chunk, columns)."""
        size, device = self.rule.chunk, self.place.device
        queries = this.query_codes[:, :, chunk * size : (chunk + number) * size].unflatten(2, (number, size))
        queries, codes = queries.transpose(1, 2)[..., None], this.key_codes
        keys = stack(codes.flatten(0, 1), chunk * size, columns, number, size).unflatten(1, codes.shape[:2])
        keys = keys.transpose(0, 1)[..., None, :]
        row = torch.arange(this.first, this.first + size, device=device)[:, None]
        column = torch.arange(columns, device=device)
        visible = _listed(queries[0], keys[0]) & (column < row if self.rule.causal else column != row)
        if self.rule.wrap:  # the chunk that is looked back at may hold the query too
            tokens = stack(this.slots, chunk * size, columns, number, size)
            visible = visible & (tokens[..., this.first : this.first + size, None] != tokens[..., None, :])
        bias = make_bias(visible, self.dtype)
        if not self.rule.dedup:
            return bias
        times = sum(_listed(*pair).to(self.dtype) for pair in zip(queries[1:], keys[1:], strict=True))
        return bias._replace(values=bias.values - torch.as_tensor(times).clamp_min(1).log())


def _at(codes: Tensor, slots: Tensor) -> Tensor:
    """Codes by token (K, G, L) of the vectors in slots (G, S)."""
    return codes.flatten(1).index_select(1, slots.flatten()).unflatten(1, slots.shape)


def _listed(queries: Tensor, keys: Tensor) -> Tensor:
    """Whether codes differ by 0 or 1."""
    return (queries - keys).bitwise_and(-2) == 0
