"""Attention over the lists of `lists`, in tiles of sorted tokens.

The tokens of a head are sorted once a round, and one call of the fused operator attends from many chunks of queries,
each to its stretch of keys, as overlapping views; of short sequences many heads and examples go into one call. The
rounds are merged by their log-sum-exp; with the merged result and log-sum-exp each round's backward pass gives its
share of the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.fused import fused_forward
from subquad.ops.lsh.calls import Call, Calls
from subquad.ops.lsh.lists import ListRule, listed_counts
from subquad.ops.lsh.order import Order, sort_by_bucket
from subquad.ops.lsh.rounds import Group, Round, Rounds
from subquad.ops.partial_softmax import merge, stack
from subquad.ops.precision import wide_dtype

NORM_EPSILON = 1e-6
"""Added to the mean square of a vector before keys are made of unit length, as in the official code."""


def attend_in_buckets_by_pairs(
    qk: Tensor, v: Tensor, buckets: Tensor, rule: ListRule, valid: Tensor | None = None
) -> Tensor:
    """The definition, quadratic in L.

    Args:
        qk: (B, H, L, E), queries, and keys before they are made of unit length.
        v: (B, H, L, E).
        buckets: int64 (B, H, rounds, L).
        rule: how lists are made.
        valid: bool (B, L), True for real tokens.

    Returns:
        (B, H, L, E), the dtype of v; 0 at invalid tokens.
    """
    wide = wide_dtype(qk)
    counts = listed_counts(buckets, rule, valid)
    scores = qk.to(wide) @ unit_keys(qk.to(wide)).mT + counts.to(wide).log()
    anything = (counts > 0).any(dim=-1, keepdim=True)
    weights = scores.masked_fill(~anything, 0.0).softmax(dim=-1) * anything
    return (weights @ v.to(wide)).to(v.dtype)


def attend_in_buckets(qk: Tensor, v: Tensor, buckets: Tensor, rule: ListRule, valid: Tensor | None = None) -> Tensor:
    """Attention over the lists; arguments and result as in `attend_in_buckets_by_pairs`."""
    rule = rule.within(*buckets.shape[2:])
    order = sort_by_bucket(buckets, rule, valid)
    return _AttentionInBuckets.apply(qk, v, order, rule)  # pyright: ignore[reportReturnType] - apply has no types


def unit_keys(x: Tensor) -> Tensor:
    """Keys of unit length from shared vectors (..., E)."""
    return x * _inverse_norm(x)[..., None]


def _inverse_norm(x: Tensor) -> Tensor:
    return (x.square().mean(dim=-1) + NORM_EPSILON).rsqrt() * x.shape[-1] ** -0.5


class _Vectors(NamedTuple):
    """What the backward pass of one group works on, its sequences one behind the other.

    Attributes:
        q: (G * L, E).
        scale: (G * L, 1), factor that makes a key of a query.
        v: (G * L, E).
        grad: (G * L, E), gradient of the merged result.
        lse: (G * L, 1), merged and finite.
        delta: (G * L, 1), the product of the merged result with its gradient.
    """

    q: Tensor
    scale: Tensor
    v: Tensor
    grad: Tensor
    lse: Tensor
    delta: Tensor


def _take(x: Tensor, slots: Tensor) -> Tensor:
    """Vectors (G * L, E) in slots (G, S): (G, S, E)."""
    return x.index_select(0, slots.flatten()).unflatten(0, slots.shape)


def _in_slots(q: Tensor, scale: Tensor, v: Tensor, this: Round) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (G, rows, E), and keys and values (G, S, E) in the slots of a round."""
    shared = _take(q, this.slots)
    return shared[:, this.first : this.first + this.rows], shared * _take(scale, this.slots), _take(v, this.slots)


def _attend_round(
    q: Tensor, scale: Tensor, v: Tensor, this: Round, calls: Iterator[Call], size: int
) -> tuple[Tensor, Tensor]:
    """Result (G * L, E) and log-sum-exp (G * L,) of one round of a group, by token."""
    room = len(this.slots), this.rows + 1
    out, lse = q.new_empty(*room, q.shape[1]), q.new_empty(room)
    out[:, this.rows], lse[:, this.rows] = 0.0, -torch.inf
    queries, keys, values = _in_slots(q, scale, v, this)
    for call in calls:
        rows, columns = (call.row, call.rows, call.number, size), (call.column, call.columns, call.number, size)
        tiles = stack(queries, *rows), stack(keys, *columns), stack(values, *columns)
        part, part_lse = fused_forward(*tiles, 1.0, call.bias.values)
        if call.bias.hidden_rows is not None:
            part_lse = part_lse.masked_fill(call.bias.hidden_rows, -torch.inf)
        stack(out, *rows).copy_(part)
        stack(lse, *rows).copy_(part_lse)
    return out.flatten(0, 1).index_select(0, this.place), lse.flatten().index_select(0, this.place)


def _round_gradients(
    vectors: _Vectors, grads: tuple[Tensor, ...], this: Round, calls: Iterator[Call], rule: ListRule
) -> None:
    """Add one round's share to the gradients of q, k and v."""
    own, size = this.slots[:, this.first : this.first + this.rows], rule.chunk
    q, k, v = _in_slots(vectors.q, vectors.scale, vectors.v, this)
    grad, lse, delta = (_take(x, own) for x in (vectors.grad, vectors.lse, vectors.delta))
    grad_q = q.new_zeros(len(own), this.rows + 1, q.shape[2])
    grad_k, grad_v = (q.new_zeros(len(own), this.slots.shape[1] + 1, q.shape[2]) for _ in range(2))
    for call in calls:
        rows, columns = (call.row, call.rows, call.number, size), (call.column, call.columns, call.number, size)
        queries, upstream, row_lse, row_delta = (stack(x, *rows) for x in (q, grad, lse, delta))
        keys, values = (stack(x, *columns) for x in (k, v))
        weights = (queries @ keys.mT).add_(call.bias.values).sub_(row_lse).exp_()
        scores = (upstream @ values.mT).sub_(row_delta).mul_(weights)
        _add_products(grad_q, scores, keys, call.row, size)
        _add_products(grad_k, scores.mT, queries, call.column, size)
        _add_products(grad_v, weights.mT, upstream, call.column, size)
    if rule.wrap:
        for total, share in zip(grads[1:], (grad_k, grad_v), strict=True):
            _pass_to_other_rounds(total, share, this)
    after = slice(this.first, this.first + this.rows + 1)
    for total, share in zip(grads, (grad_q, grad_k[:, after], grad_v[:, after]), strict=True):
        total += share.reshape(-1, q.shape[2]).index_select(0, this.place)


def _pass_to_other_rounds(total: Tensor, share: Tensor, this: Round) -> None:
    """Add to gradients (G * L, E) what the slots (G, S + 1, E) of other rounds' tokens have got."""
    found = share.gather(1, this.others[..., None].expand(-1, -1, share.shape[2]))
    total.index_add_(0, this.slots.gather(1, this.others).flatten(), found.flatten(0, 1))
    share[:, this.first + this.rows] = 0.0  # which stands for all invalid tokens


def _add_products(target: Tensor, weights: Tensor, x: Tensor, first: int, step: int) -> None:
    """Add the products of tiles (n, G, S, T) and (n, G, T, E) to stretches of (G, length, E), `step` apart.

    Stretches overlap, but not in one and the same chunk of theirs. Those of one sequence are matrices at equal
    distances, to which products are added without a temporary.
    """
    for start in range(0, weights.shape[2], step):
        some = weights[:, :, start : start + step]
        part = stack(target, first + start, some.shape[2], len(some), step)
        if len(target) == 1:
            part[:, 0].baddbmm_(some[:, 0], x[:, 0])
        else:
            part.add_(some @ x)


class _AttentionInBuckets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qk: Tensor, v: Tensor, order: Order, rule: ListRule) -> Tensor:
        dtype = wide_dtype(qk)
        batch, num_heads, length, width = v.shape
        out = v.new_zeros(batch, length, num_heads, width).transpose(1, 2)
        lse = torch.full((batch, num_heads, length), -torch.inf, dtype=dtype, device=v.device)
        rounds, calls = Rounds(order, rule, dtype), Calls(rule, width, dtype)
        for group in rounds.groups(width):
            q, values = (_gather(x, group, dtype) for x in (qk, v))
            scale, merged = _inverse_norm(q)[:, None], torch.zeros_like(values)
            merged_lse = torch.full_like(values[:, 0], -torch.inf)
            for index, this in enumerate(rounds.of_group(group)):
                part = _attend_round(q, scale, values, this, calls.of_round(this), rule.chunk)
                merge(merged, merged_lse, *part, fresh=index == 0)
            alone = _alone(merged_lse, rounds, group)
            merged[alone] = values[alone]
            _scatter(out, group, merged)
            _scatter(lse, group, merged_lse)
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
        rounds, calls = Rounds(order, ctx.rule, dtype), Calls(ctx.rule, v.shape[-1], dtype)
        for group in rounds.groups(v.shape[-1]):
            q, values, merged, upstream = (_gather(x, group, dtype) for x in (qk, v, out, grad))
            scale, merged_lse = _inverse_norm(q)[:, None], _gather(lse, group, dtype)
            k, of_q, of_k, of_v = q * scale, *(torch.zeros_like(x) for x in (q, q, values))
            finite = merged_lse.masked_fill(merged_lse == -torch.inf, 0.0)[:, None]
            delta = (merged * upstream).sum(dim=-1, keepdim=True)
            vectors = _Vectors(q, scale, values, upstream, finite, delta)
            for this in rounds.of_group(group):
                _round_gradients(vectors, (of_q, of_k, of_v), this, calls.of_round(this), ctx.rule)
            alone = _alone(merged_lse, rounds, group)
            of_v[alone] += upstream[alone]
            _scatter(grad_qk, group, of_q + scale * (of_k - k * (k * of_k).sum(dim=-1, keepdim=True)))
            _scatter(grad_v, group, of_v)
        return grad_qk, grad_v, None, None


def _gather(x: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """Vectors or numbers (B, H, L, ...) of a group, one sequence behind the other: (G * L, ...), contiguous."""
    return x[group.where].to(dtype).flatten(0, 2).contiguous()


def _scatter(x: Tensor, group: Group, found: Tensor) -> None:
    """Write what `_gather` reads."""
    target = x[group.where]
    target.copy_(found.view(target.shape))


def _alone(lse: Tensor, rounds: Rounds, group: Group) -> Tensor:
    """The valid tokens on whose lists nothing is, int64: they attend to themselves."""
    valid = rounds.place[group.where][:, :, 0].flatten(0, 1) < group.counts
    return (valid.flatten() & (lse == -torch.inf)).nonzero()[:, 0]
