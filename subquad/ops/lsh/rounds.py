"""The rounds of groups of heads: which sorted tokens stand where, and the codes that tell who is on whose list."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.lsh.lists import ListRule
from subquad.ops.lsh.order import NO_KEY, NO_QUERY, Order, codes_of_chunks

GROUP_BYTES = 2**20
"""Vectors of the heads that are worked on together: they stay in the cache, and are many where sequences are short."""


class Group(NamedTuple):
    """Heads of examples that are worked on together, G of them.

    Attributes:
        where: examples and heads.
        counts: int64 (G, 1), number of valid tokens.
        smallest: the smallest count.
        largest: the largest count.
    """

    where: tuple[slice, slice]
    counts: Tensor
    smallest: int
    largest: int


class Round(NamedTuple):
    """One round of a group; its vectors (G * L, E) stand one sequence behind the other.

    Attributes:
        slots: int64 (G, S), the vector of each slot; in a slot that holds none any of the sequence stands in.
        first: slot of the first query.
        rows: slots of queries.
        place: int64 (G * L,), where each token's query is among (G, rows + 1); an invalid token's is the last of its G.
        query_codes: int32 (K, G, rows); the first row makes the list, the others tell how often a token is listed.
        key_codes: int32 (K, G, S); K = 0 where tiles alone make the list.
        reach: int32 (1 or G, 1, 1), how much the codes of a query and of a key on its list differ at most.
        others: int64 (G, N), the slots in which tokens of other rounds may stand.
    """

    slots: Tensor
    first: int
    rows: int
    place: Tensor
    query_codes: Tensor
    key_codes: Tensor
    reach: Tensor
    others: Tensor

    @property
    def plain(self) -> bool:
        """Whether tiles alone make the list."""
        return not len(self.key_codes)


class _Lists(NamedTuple):
    """How far lists reach in a group, and the slots that this takes.

    Attributes:
        first: slots before those of the queries.
        behind: slots behind them.
        before: int32 (1 or G, 1), chunks on a list before the own.
        after: int32 (1 or G, 1), chunks on a list after the own.
        chunks: int64 (G, 1), chunks of a round.
        others: int64 (G, N), the slots in which tokens of other rounds may stand.
    """

    first: int
    behind: int
    before: Tensor
    after: Tensor
    chunks: Tensor
    others: Tensor


class Rounds:
    """The rounds of every head."""

    def __init__(self, order: Order, rule: ListRule, dtype: torch.dtype) -> None:
        self.order, self.rule, self.dtype = order, rule, dtype
        tokens = order.tokens.long()
        places = torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)
        self.place = torch.empty_like(tokens).scatter_(-1, tokens, places)

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
                yield Group(where, of_each, min(counts), max(counts))

    def of_group(self, group: Group) -> Iterator[Round]:
        """The rounds of a group."""
        tokens, place = (x[group.where].flatten(0, 1).transpose(0, 1) for x in (self.order.tokens, self.place))
        begin = torch.arange(tokens.shape[1], device=tokens.device)[:, None]
        tokens = tokens.long() + begin * tokens.shape[2]
        rows = group.largest
        if self.order.codes is None and group.smallest == group.largest:
            nothing = tokens.new_empty(0, 0, 0)
            for own, target in zip(tokens, place, strict=True):
                target = target.clamp_max(rows) + begin * (rows + 1)
                yield Round(own[:, :rows], 0, rows, target.flatten(), nothing, nothing, nothing, nothing)
            return
        rows = -(-rows // self.rule.chunk) * self.rule.chunk
        lists = self._lists_on_ring(group, rows) if self.rule.wrap else self._lists_in_order(group, rows)
        reach = (lists.before + lists.after)[..., None]
        for index, (slots, queries, keys) in enumerate(self._coded(group, lists, tokens, place, rows)):
            target = place[index].masked_fill(place[index] >= group.counts, rows) + begin * (rows + 1)
            yield Round(slots, lists.first, rows, target.flatten(), queries, keys, reach, lists.others)

    def _coded(
        self, group: Group, lists: _Lists, tokens: Tensor, place: Tensor, rows: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Slots and codes of queries and keys of each round; tokens and place: int64 (rounds, G, L)."""
        first, count, codes = lists.first, group.largest, self._codes_of(group, tokens)
        shift, asking, own_rows = lists.before - lists.after, codes[:0], slice(first, first + rows)
        asked = asking
        if self.rule.dedup:
            asking, asked = self._by_token(group, lists, codes.gather(2, place))
        hidden = torch.arange(count, device=tokens.device) >= group.counts
        for index, (in_order, of_places) in enumerate(zip(tokens, codes, strict=True)):
            slots = in_order[:, :1].repeat(1, first + rows + lists.behind)
            keys = torch.full_like(slots, NO_KEY, dtype=torch.int32)
            slots[:, first : first + count] = in_order[:, :count]
            keys[:, first : first + count] = of_places[:, :count].masked_fill(hidden, NO_KEY)
            queries = (keys[:, own_rows] - shift).masked_fill_(keys[:, own_rows] == NO_KEY, NO_QUERY)
            if self.rule.wrap:
                neighbours, their_codes = self._neighbours(group, lists, tokens, index)
                slots.scatter_(1, lists.others, neighbours)
                keys.scatter_(1, lists.others, their_codes)
            of_queries, of_keys = (queries[None], _at(asking, slots[:, own_rows])), (keys[None], _at(asked, slots))
            yield slots, torch.cat(of_queries), torch.cat(of_keys)

    def _codes_of(self, group: Group, tokens: Tensor) -> Tensor:
        """Codes of a group by place, (rounds, G, L); where tiles alone make the lists, they tell chunks apart."""
        if self.order.codes is not None:
            return self.order.codes[group.where].flatten(0, 1).transpose(0, 1)
        return codes_of_chunks(tokens.shape[2], self.rule.chunk, tokens.device).expand_as(tokens)

    def _by_token(self, group: Group, lists: _Lists, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of queries and of keys, (K, G, L): a key is on as many lists of a query as there are pairs that fit.

        Of each round (rounds, G, L) there is one; on a ring one more for every round that its lists reach into.
        """
        asking = codes - (lists.before - lists.after)
        if not self.rule.wrap:
            return asking, codes
        fewest = max(1, -(-group.smallest // self.rule.chunk))
        sides = self.rule.chunks_before, self.rule.chunks_after
        before, after = (min(len(codes), -(-side // fewest)) for side in sides)
        turns, a_round = range(-before, after + 1), 2 * lists.chunks.int()
        asked = [codes.roll(-turn, dims=0) + turn * a_round for turn in turns]
        return asking.repeat(len(turns), 1, 1), torch.cat(asked)

    def _lists_in_order(self, group: Group, rows: int) -> _Lists:
        """Lists that end where their round does; chunks inside buckets begin between the borders of tiles too."""
        rule, size = self.rule, self.rule.chunk
        before, after = (torch.full((1, 1), side, dtype=torch.int32, device=self.place.device) for side in rule.sides)
        first, behind = (min(side + rule.per_bucket, rows // size - 1) * size for side in rule.sides)
        nothing = group.counts[:, :0]
        return _Lists(first, 0 if rule.causal else behind, before, after, -(-group.counts // size), nothing)

    def _lists_on_ring(self, group: Group, rows: int) -> _Lists:
        """Lists that go on in other rounds, up to the whole ring; tokens of those stand before and behind the own."""
        size, rounds, (most_before, most_after) = self.rule.chunk, self.order.tokens.shape[2], self.rule.sides
        chunks = -(-group.counts // size)
        others = (rounds * chunks - 1).int()
        after = others.clamp(0, most_after)
        before = (others - after).clamp(0, most_before)
        longest = rounds * rows // size - 1
        behind = min(most_after, longest)
        first = min(most_before, longest - behind)
        slot = torch.arange((first + behind) * size, device=chunks.device)
        slots = torch.where(slot < first * size, slot, slot + chunks * size)
        return _Lists(first * size, behind * size, before, after, chunks, slots)

    def _neighbours(self, group: Group, lists: _Lists, tokens: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Tokens and codes of a round's slots for tokens of other rounds; tokens: int64 (rounds, G, L)."""
        rounds, _, length = tokens.shape
        places, a_round = lists.others - lists.first, (lists.chunks * self.rule.chunk).clamp_min(1)
        place, other = places % a_round, (places.div(a_round, rounding_mode="floor") + index) % rounds
        codes = (2 * places.div(self.rule.chunk, rounding_mode="floor")).int()
        found = tokens.transpose(0, 1).flatten(1).gather(1, other * length + place.clamp_max(length - 1))
        return found, codes.masked_fill_(place >= group.counts, NO_KEY)


def _at(codes: Tensor, slots: Tensor) -> Tensor:
    """Codes by token (K, G, L) of the vectors in slots (G, S)."""
    return codes.flatten(1).index_select(1, slots.flatten()).unflatten(1, slots.shape)
