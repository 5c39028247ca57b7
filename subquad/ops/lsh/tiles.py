"""Attention over the lists of `lists`, in tiles of sorted tokens.

The tokens of one head are sorted once a round, and one call of the fused operator attends from many chunks of queries,
each to its stretch of keys, as overlapping views. The rounds are merged by their log-sum-exp; with the merged result
and log-sum-exp each round's backward pass gives its share of the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.fused import fused_forward
from subquad.ops.lsh.lists import ListRule
from subquad.ops.lsh.rounds import Call, Order, Round, Rounds, sort_by_bucket
from subquad.ops.piece import merge, stack

NORM_EPSILON = 1e-6
"""Added to the mean square of a vector before keys are made of unit length, as in the official code."""


def attend_in_buckets(qk: Tensor, v: Tensor, buckets: Tensor, rule: ListRule, valid: Tensor | None = None) -> Tensor:
    """Attention over the lists; arguments and result as in `attend_in_buckets_by_pairs`."""
    order = sort_by_bucket(buckets, rule, valid)
    return _AttentionInBuckets.apply(qk, v, order, rule)  # pyright: ignore[reportReturnType] - apply has no types


def unit_keys(x: Tensor) -> Tensor:
    """Keys of unit length from shared vectors (..., E)."""
    return x * _inverse_norm(x)[..., None]


def _inverse_norm(x: Tensor) -> Tensor:
    return (x.square().mean(dim=-1) + NORM_EPSILON).rsqrt() * x.shape[-1] ** -0.5


class _Head(NamedTuple):
    """What the backward pass of one head works on.

    Attributes:
        q: (L, E).
        scale: (L,), factor that makes a key of a query.
        v: (L, E).
        grad: (L, E), gradient of the merged result.
        lse: (L,), merged and finite.
        delta: (L,), the product of the merged result with its gradient.
    """

    q: Tensor
    scale: Tensor
    v: Tensor
    grad: Tensor
    lse: Tensor
    delta: Tensor


def _in_slots(q: Tensor, scale: Tensor, v: Tensor, this: Round) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (rows, E), and keys and values (S, E) in the slots of a round."""
    shared = q.index_select(0, this.slots)
    keys, values = shared * scale.index_select(0, this.slots)[:, None], v.index_select(0, this.slots)
    return shared[this.first : this.first + this.rows], keys, values


def _attend_round(
    q: Tensor, scale: Tensor, v: Tensor, this: Round, calls: Iterator[Call], size: int
) -> tuple[Tensor, Tensor]:
    """Result (L, E) and log-sum-exp (L,) of one round of a head (L, E), by token."""
    out, lse = q.new_empty(this.rows + 1, q.shape[1]), q.new_empty(this.rows + 1)
    out[this.rows], lse[this.rows] = 0.0, -torch.inf
    queries, keys, values = _in_slots(q, scale, v, this)
    for call in calls:
        rows, columns = (call.row, call.rows, call.number, size), (call.column, call.columns, call.number, size)
        tiles = stack(queries[None], *rows), stack(keys[None], *columns), stack(values[None], *columns)
        part, part_lse = _attend_tiles(*tiles, call.bias.values)
        if call.bias.hidden_rows is not None:
            part_lse = part_lse.masked_fill(call.bias.hidden_rows, -torch.inf)
        stack(out[None], *rows).copy_(part)
        stack(lse[None], *rows).copy_(part_lse)
    place = this.place.clamp_max(this.rows)
    return out.index_select(0, place), lse.index_select(0, place)


def _attend_tiles(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of tiles, as `fused_forward`, which is for the CPU; 0 in rows that see nothing."""
    if q.device.type == "cpu":
        return fused_forward(q, k, v, 1.0, bias)
    scores = q @ k.mT + bias
    return scores.softmax(dim=-1).nan_to_num(0.0) @ v, scores.logsumexp(dim=-1)


def _round_gradients(head: _Head, grads: tuple[Tensor, ...], this: Round, calls: Iterator[Call], size: int) -> None:
    """Add one round's share to the gradients of q, k and v."""
    own = this.slots[this.first : this.first + this.rows]
    q, k, v = _in_slots(head.q, head.scale, head.v, this)
    grad, lse, delta = (x.index_select(0, own) for x in (head.grad, head.lse, head.delta))
    grad_q = q.new_empty(this.rows + 1, q.shape[1])
    grad_q[this.rows] = 0.0
    grad_k, grad_v = (q.new_zeros(len(this.slots) + 1, q.shape[1]) for _ in range(2))
    for call in calls:
        rows, columns = (call.row, call.rows, call.number, size), (call.column, call.columns, call.number, size)
        queries, upstream, row_lse, row_delta = (
            stack(x[None], *rows)[:, 0] for x in (q, grad, lse[:, None], delta[:, None])
        )
        keys, values = (stack(x[None], *columns)[:, 0] for x in (k, v))
        weights = torch.bmm(queries, keys.mT).add_(call.bias.values[:, 0]).sub_(row_lse).exp_()
        scores = torch.bmm(upstream, values.mT).sub_(row_delta).mul_(weights)
        torch.bmm(scores, keys, out=stack(grad_q[None], *rows)[:, 0])
        for start in range(0, call.columns, size):  # tiles overlap, but not in one and the same chunk of theirs
            part = slice(start, start + size)
            chunks = call.column + start, min(size, call.columns - start), call.number, size
            stack(grad_k[None], *chunks)[:, 0].baddbmm_(scores[:, :, part].mT, queries)
            stack(grad_v[None], *chunks)[:, 0].baddbmm_(weights[:, :, part].mT, upstream)
    place = this.place.clamp_max(this.rows)
    for total, share in zip(grads, (grad_q, grad_k[this.first :], grad_v[this.first :]), strict=True):
        total += share.index_select(0, place)
    if looked_back := this.first:
        for total, share in zip(grads[1:], (grad_k, grad_v), strict=True):
            total.index_add_(0, this.slots[:looked_back], share[:looked_back])


class _AttentionInBuckets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qk: Tensor, v: Tensor, order: Order, rule: ListRule) -> Tensor:
        dtype = torch.promote_types(qk.dtype, torch.float32)
        batch, num_heads, length, width = v.shape
        out = v.new_zeros(batch, length, num_heads, width).transpose(1, 2)
        lse = torch.full((batch, num_heads, length), -torch.inf, dtype=dtype, device=v.device)
        rounds = Rounds(order, rule, dtype)
        for example, head in _heads(order, num_heads):
            q, values = (x[example, head].to(dtype).contiguous() for x in (qk, v))
            scale, merged, merged_lse = _inverse_norm(q), torch.zeros_like(values), lse[example, head]
            for index, this in enumerate(rounds.of_head(example, head)):
                part = _attend_round(q, scale, values, this, rounds.calls(this, width), rule.chunk)
                merge(merged, merged_lse, *part, fresh=index == 0)
            alone = _alone(merged_lse, rounds, example, head)
            merged[alone] = values[alone]
            out[example, head] = merged
        ctx.save_for_backward(qk, v, out, lse, order.tokens, order.codes)
        ctx.counts, ctx.rule = order.counts, rule
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's stub knows no fixed number of results
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        qk, v, out, lse, tokens, codes = ctx.saved_tensors
        order, dtype = Order(tokens, codes, ctx.counts), lse.dtype
        grad_qk, grad_v = torch.zeros_like(qk), torch.zeros_like(v)
        rounds = Rounds(order, ctx.rule, dtype)
        for example, head in _heads(order, qk.shape[1]):
            q, values, merged, upstream = (x[example, head].to(dtype).contiguous() for x in (qk, v, out, grad))
            scale, merged_lse = _inverse_norm(q), lse[example, head]
            k, of_q, of_k, of_v = q * scale[:, None], *(torch.zeros_like(x) for x in (q, q, values))
            finite = merged_lse.masked_fill(merged_lse == -torch.inf, 0.0)
            parts = _Head(q, scale, values, upstream, finite, (merged * upstream).sum(dim=-1))
            for this in rounds.of_head(example, head):
                _round_gradients(parts, (of_q, of_k, of_v), this, rounds.calls(this, v.shape[-1]), ctx.rule.chunk)
            alone = _alone(merged_lse, rounds, example, head)
            of_v[alone] += upstream[alone]
            grad_qk[example, head] = of_q + scale[:, None] * (of_k - k * (k * of_k).sum(dim=-1, keepdim=True))
            grad_v[example, head] = of_v
        return grad_qk, grad_v, None, None


def _heads(order: Order, num_heads: int) -> Iterator[tuple[int, int]]:
    """Heads of the examples that have a valid token."""
    for example, count in enumerate(order.counts):
        if count:
            for head in range(num_heads):
                yield example, head


def _alone(lse: Tensor, rounds: Rounds, example: int, head: int) -> Tensor:
    """The valid tokens on whose lists nothing is, int64: they attend to themselves."""
    valid = rounds.place[example, head, 0] < rounds.order.counts[example]
    return (valid & (lse == -torch.inf)).nonzero()[:, 0]
