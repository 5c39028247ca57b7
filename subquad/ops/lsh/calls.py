"""The tiles that hold the lists of `lists`, and the calls of the fused operator that attend in them.

Every chunk of queries attends to a stretch of the order that holds its list. Where the list is not the whole stretch,
the codes of `order` tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from subquad.ops.lsh.lists import ListRule
from subquad.ops.lsh.order import is_listed
from subquad.ops.lsh.rounds import Round
from subquad.ops.partial_softmax import CALL_BYTES, Bias, make_bias, stack


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


class Calls:
    """The calls that rounds of heads of a width are made up of, none with temporaries that leave the cache."""

    def __init__(self, rule: ListRule, width: int, dtype: torch.dtype) -> None:
        self.rule, self.width, self.dtype = rule, width, dtype
        self.biases: dict[tuple[int, int, int], Bias] = {}

    def of_round(self, this: Round) -> Iterator[Call]:
        """The calls of a round."""
        return self._plain(this) if this.plain else self._coded(this)

    def _coded(self, this: Round) -> Iterator[Call]:
        """Calls in which codes tell who is listed."""
        size, columns = self.rule.chunk, this.slots.shape[1] - this.rows + self.rule.chunk
        elements = (size + 2 * columns) * self.width + (1 + len(this.key_codes)) * size * columns
        step = max(1, CALL_BYTES // (len(this.slots) * elements * self.dtype.itemsize))
        for chunk in range(0, this.rows // size, step):
            number = min(step, this.rows // size - chunk)
            yield Call(chunk * size, size, chunk * size, columns, number, self._bias_of_codes(this, chunk, number))

    def _bias_of_codes(self, this: Round, chunk: int, number: int) -> Bias:
        """The bias of some chunks, (number, G, chunk, columns)."""
        size, columns, device = self.rule.chunk, this.slots.shape[1] - this.rows + self.rule.chunk, this.slots.device
        queries = this.query_codes[:, :, chunk * size : (chunk + number) * size].unflatten(2, (number, size))
        queries, codes = queries.transpose(1, 2)[..., None], this.key_codes
        keys = stack(codes.flatten(0, 1), chunk * size, columns, number, size).unflatten(1, codes.shape[:2])
        keys = keys.transpose(0, 1)[..., None, :]
        row = torch.arange(this.first, this.first + size, device=device)[:, None]
        column = torch.arange(columns, device=device)
        visible = is_listed(queries[0], keys[0], this.reach) & (column < row if self.rule.causal else column != row)
        if self.rule.wrap:  # a chunk of another round may hold the query too
            tokens = stack(this.slots, chunk * size, columns, number, size)
            visible = visible & (tokens[..., this.first : this.first + size, None] != tokens[..., None, :])
        bias = make_bias(visible, self.dtype)
        if not self.rule.dedup:
            return bias
        pairs = zip(queries[1:], keys[1:], strict=True)
        times = sum(is_listed(*pair, this.reach).to(self.dtype) for pair in pairs)
        return bias._replace(values=bias.values - torch.as_tensor(times).clamp_min(1).log())

    def _plain(self, this: Round) -> Iterator[Call]:
        """Calls in which everything but the query itself is listed: chunks of whole lists together, others alone."""
        (before, after), size = self.rule.sides, self.rule.chunk
        chunks, whole = -(-this.rows // size), range(before, this.rows // size - after)
        elements = len(this.slots) * size * self.width * (1 + 2 * (before + 1 + after))
        step = max(1, 2 * CALL_BYTES // (elements * self.dtype.itemsize))
        for chunk in (*range(min(before, chunks)), *whole[::step], *range(max(before, whole.stop), chunks)):
            column, end = max(0, chunk - before) * size, min((chunk + 1 + after) * size, this.rows)
            row, number = chunk * size, min(step, whole.stop - chunk) if chunk in whole else 1
            rows, columns = min(size, this.rows - row), end - column
            yield Call(row, rows, column, columns, number, self._bias(row - column, rows, columns, this.slots.device))

    def _bias(self, ahead: int, rows: int, columns: int, device: torch.device) -> Bias:
        """The bias of queries that are the keys in some column and behind it."""
        if (ahead, rows, columns) not in self.biases:
            visible = ~torch.eye(columns, dtype=torch.bool, device=device)[ahead : ahead + rows]
            self.biases[ahead, rows, columns] = make_bias(visible[None, None], self.dtype)
        return self.biases[ahead, rows, columns]
