"""What pattern attention is asked for: checked once, the same for every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from subquad.mask import Mask, holds_integers
from subquad.patterns.expression import write_pattern
from subquad.patterns.pattern import Pattern
from subquad.patterns.terms import check_integer


@dataclass(frozen=True)
class Facts:
    """What varies by example. None: no restriction.

    Attributes:
        query_valid: bool (B, L); rows of invalid queries give 0.
        key_valid: bool (B, S).
        query_segments: int (B, L); together with key_segments, only equal ones see each other.
        key_segments: int (B, S).
        global_keys: bool (B, S): keys that every query of their example sees, besides the pattern's; in heads whose
            pattern is causal, every later query.
    """

    query_valid: Tensor | None = None
    key_valid: Tensor | None = None
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None
    global_keys: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Facts:
        """The same change to all facts that there are."""
        return Facts(*(None if (fact := getattr(self, field.name)) is None else change(fact) for field in fields(self)))

    def example(self, index: int) -> Facts:
        """The facts of one example, without the batch dimension."""
        return self.map(lambda fact: fact[index])

    def to(self, device: torch.device) -> Facts:
        """The same on another device."""
        return self.map(lambda fact: fact.to(device))

    @property
    def anything(self) -> bool:
        """Whether there is any restriction or addition."""
        return any(
            fact is not None for fact in (self.query_valid, self.key_valid, self.query_segments, self.global_keys)
        )


@dataclass(frozen=True)
class Request:
    """A checked call of pattern attention.

    Attributes:
        pattern: as given.
        facts: what varies by example.
        offsets: absolute position of the first query: one for all examples, or one for each.
        scale: factor of the scores.
    """

    pattern: Pattern
    facts: Facts
    offsets: tuple[int, ...]
    scale: float

    def offset(self, example: int) -> int:
        """Absolute position of the first query of an example."""
        return self.offsets[min(example, len(self.offsets) - 1)]


def visible_mask(
    request: Request,
    pattern: Pattern,
    num_heads: int,
    rows: range,
    columns: range,
    ask: Callable[[Pattern, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Which pairs are visible, pattern and facts together.

    Args:
        request: its facts and offsets count.
        pattern: its pattern, resolved.
        num_heads: H.
        rows: of queries.
        columns: of keys.
        ask: what the pattern of one head shows of queries (n, rows, 1) and keys (columns); its predicate by default.

    Returns:
        bool (B or 1, H or 1, rows, columns).
    """
    facts = request.facts
    given = next(
        (fact for fact in (facts.key_valid, facts.query_segments, facts.global_keys) if fact is not None), None
    )
    device = None if given is None else given.device
    i = (
        torch.tensor(request.offsets, device=device)[:, None, None]
        + torch.arange(rows.start, rows.stop, device=device)[:, None]
    )
    j = torch.arange(columns.start, columns.stop, device=device)
    distinct = [pattern.of_head(head) for head in range(num_heads)] if pattern.num_heads else [pattern]
    shape = len(request.offsets), len(rows), len(columns)
    seen = [head.visible(i, j) if ask is None else ask(head, i, j) for head in (head.to(i.device) for head in distinct)]
    visible = torch.stack([of_head.expand(shape) for of_head in seen], dim=1)
    query, key = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
    if facts.global_keys is not None:
        forward = torch.tensor([not head.causal for head in distinct], device=device)[:, None, None]
        visible = visible | (facts.global_keys[:, None, None, key] & (forward | (j <= i)[:, None]))
    if facts.key_valid is not None:
        visible = visible & facts.key_valid[:, None, None, key]
    if facts.query_valid is not None:
        visible = visible & facts.query_valid[:, None, query, None]
    if facts.query_segments is not None and facts.key_segments is not None:
        same = facts.query_segments[:, None, query, None] == facts.key_segments[:, None, None, key]
        visible = visible & same
    return visible


def check_request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    mask: Mask | None,
    key_valid: Tensor | None,
    key_segments: Tensor | None,
    scale: float | None,
    query_offset: int | Tensor,
) -> Request:
    """Check everything that a caller can get wrong.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, or a pattern in which no query ever sees a key.
    """
    _check_tensors(q, k, v)
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern_attention: pattern must come from subquad.patterns, got {type(pattern).__name__}")
    _check_pattern(pattern, q.shape[1])
    facts = _facts(q, k, mask, key_valid, key_segments)
    return Request(pattern, facts, _offsets(q, query_offset), _scale(q, scale))


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(
                f"pattern_attention: {name} must be (batch, heads, length, width), got {tuple(tensor.shape)}"
            )
        if tensor.dtype != q.dtype or not tensor.is_floating_point():
            raise ValueError(
                "pattern_attention: q, k and v must have one floating-point dtype, got "
                f"{q.dtype}, {k.dtype}, {v.dtype}; convert them with .to(dtype)"
            )
        if tensor.device != q.device:
            raise ValueError(f"pattern_attention: q is on {q.device} but {name} is on {tensor.device}; move it there")
    if k.shape != v.shape or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise ValueError(
            f"pattern_attention: expected q (B, H, L, E) and k, v (B, H, S, E), got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )


@lru_cache(maxsize=64)
def _check_pattern(pattern: Pattern, num_heads: int) -> None:
    """Remembered, since a call of few tokens would take twice as long."""
    if pattern.num_heads > num_heads:
        raise ValueError(
            f"pattern_attention: the pattern speaks of head {pattern.num_heads - 1}, q has {num_heads} heads, counted "
            "from 0; give .heads only those"
        )
    for head in range(num_heads if pattern.num_heads else 1):
        if not pattern.of_head(head).terms():
            which = f" of head {head}" if pattern.num_heads else ""
            raise ValueError(
                f"pattern_attention: no query{which} sees any key in {write_pattern(pattern.of_head(head))}; the "
                "result would be 0 everywhere; join it with a pattern that isn't empty"
            )


def _scale(q: Tensor, scale: float | None) -> float:
    if isinstance(scale, Tensor):
        raise ValueError(
            "pattern_attention: scale must be a number, got a tensor; multiply q by it, which has a gradient"
        )
    return 1 / math.sqrt(max(1, q.shape[-1])) if scale is None else scale


def _check_keys(q: Tensor, key_length: int, name: str, fact: object) -> None:
    owner, expected = "pattern_attention", (q.shape[0], key_length)
    if not isinstance(fact, Tensor):
        raise ValueError(f"{owner}: {name} must be a tensor (B, S) = {expected}, got {type(fact).__name__}")
    if tuple(fact.shape) != expected:
        raise ValueError(f"{owner}: {name} must have shape (B, S) = {expected}, got {tuple(fact.shape)}")
    if fact.device != q.device:
        raise ValueError(f"{owner}: {name} is on {fact.device} but q is on {q.device}; move it there")


def _facts(q: Tensor, k: Tensor, mask: Mask | None, key_valid: Tensor | None, key_segments: Tensor | None) -> Facts:
    owner, length, key_length = "pattern_attention", q.shape[2], k.shape[2]
    mask = Mask() if mask is None else mask
    if not isinstance(mask, Mask):
        raise ValueError(f"{owner}: mask must be a subquad.Mask, got {type(mask).__name__}; write Mask(valid=...)")
    mask.check(owner, q[:, 0])
    if key_valid is not None:
        _check_keys(q, key_length, "key_valid", key_valid)
        if key_valid.dtype != torch.bool:
            raise ValueError(
                f"{owner}: key_valid must be bool (True = keep), got {key_valid.dtype}; write (tensor != 0)"
            )
    if key_segments is not None:
        _check_keys(q, key_length, "key_segments", key_segments)
        if not holds_integers(key_segments):
            raise ValueError(f"{owner}: key_segments must hold integers, got {key_segments.dtype}")
    same = length == key_length
    if mask.global_tokens is not None and not same:
        raise ValueError(f"{owner}: mask.global_tokens needs as many keys as queries, got {key_length} and {length}")
    if mask.segments is not None and key_segments is None and not same:
        raise ValueError(
            f"{owner}: mask.segments with {length} queries and {key_length} keys needs key_segments (B, S)"
        )
    if mask.segments is None and key_segments is not None:
        raise ValueError(f"{owner}: key_segments are compared with mask.segments, which are missing")
    if mask.valid is not None and same:
        key_valid = mask.valid if key_valid is None else key_valid & mask.valid
    return Facts(
        query_valid=mask.valid,
        key_valid=key_valid,
        query_segments=mask.segments,
        key_segments=mask.segments if key_segments is None else key_segments,
        global_keys=mask.global_tokens,
    )


def _offsets(q: Tensor, query_offset: int | Tensor) -> tuple[int, ...]:
    remedy = "it is the position of the first query"
    if not isinstance(query_offset, Tensor):
        check_integer("pattern_attention", "query_offset", query_offset, least=0, remedy=remedy)
        return (query_offset,)
    if query_offset.shape != q.shape[:1] or not holds_integers(query_offset):
        raise ValueError(
            f"pattern_attention: query_offset must be an int or int64 (B,) = ({q.shape[0]},), got "
            f"{query_offset.dtype} {tuple(query_offset.shape)}"
        )
    offsets = tuple(query_offset.tolist()) or (0,)
    check_integer("pattern_attention", "query_offset", min(offsets), least=0, remedy=remedy)
    return offsets[:1] if len(set(offsets)) == 1 else offsets
