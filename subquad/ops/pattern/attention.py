"""Softmax attention over the keys that a pattern makes visible.

    s_ij = scale q_i · k_j        o_i = Σ_j exp(s_ij - lse_i) v_j        lse_i = log Σ_j exp(s_ij)        j visible to i

A query that sees nothing gives 0, has lse = -inf, and sends no gradient anywhere. Three backends give the same result:
`dense` is the definition, with an L x S matrix; `blocked` computes only what is visible, in memory linear in L; `flex`
hands the pattern to FlexAttention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from subquad.mask import Mask
from subquad.ops.pattern.blocked import attend_blocked
from subquad.ops.pattern.flex import attend_flex, why_not
from subquad.ops.pattern.request import Request, check_request, visible_mask
from subquad.ops.precision import full_precision
from subquad.ops.softmax import softmax_attention_with_lse
from subquad.patterns.pattern import Pattern
from subquad.receipt import leave_receipt

ON_FLEX = "cuda"
"""The type of device on which FlexAttention is the default."""


def attend_dense(q: Tensor, k: Tensor, v: Tensor, request: Request) -> tuple[Tensor, Tensor]:
    """The definition."""
    pattern = request.pattern.resolve(k.shape[2])
    visible = visible_mask(request, pattern, q.shape[1], range(q.shape[2]), range(k.shape[2]))
    return softmax_attention_with_lse(q, k, v, visible.to(q.device), request.scale)


def pattern_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    mask: Mask | None = None,
    key_valid: Tensor | None = None,
    key_segments: Tensor | None = None,
    scale: float | None = None,
    query_offset: int | Tensor = 0,
    backend: str | None = None,
) -> Tensor:
    """Attend; arguments and errors as in `pattern_attention_with_lse`.

    Returns:
        (B, H, L, E), the dtype of q.
    """
    request = check_request(
        q,
        k,
        v,
        pattern,
        mask=mask,
        key_valid=key_valid,
        key_segments=key_segments,
        scale=scale,
        query_offset=query_offset,
    )
    return _attend(q, k, v, request, backend, with_lse=False)[0]


def pattern_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    mask: Mask | None = None,
    key_valid: Tensor | None = None,
    key_segments: Tensor | None = None,
    scale: float | None = None,
    query_offset: int | Tensor = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend, and return the log-sum-exp of every row too, by which partial results are merged exactly.

    Args:
        q: (B, H, L, E), any strides.
        k: (B, H, S, E).
        v: (B, H, S, E).
        pattern: who attends whom, in absolute positions.
        mask: facts about the tokens of q; where S = L, about those of k too. Its global tokens are seen by all queries
            of their example (by later ones only, in heads whose pattern is causal).
        key_valid: bool (B, S), True for a real key.
        key_segments: int (B, S), compared with `mask.segments`; needed where S differs from L.
        scale: factor of the scores; 1 / √E by default.
        query_offset: position of the first query, an int or int64 (B,).
        backend: "dense", "blocked" or "flex"; by default "flex" on CUDA, but "blocked", with a receipt, for what
            FlexAttention doesn't do there, and "blocked" on every other device.

    Returns:
        out (B, H, L, E), the dtype of q; lse (B, H, L), float32 or wider. Both are differentiable.

    Raises:
        ValueError: what doesn't fit, and what to do instead.
    """
    request = check_request(
        q,
        k,
        v,
        pattern,
        mask=mask,
        key_valid=key_valid,
        key_segments=key_segments,
        scale=scale,
        query_offset=query_offset,
    )
    out, lse = _attend(q, k, v, request, backend, with_lse=True)
    assert lse is not None
    return out, lse


def _attend(
    q: Tensor, k: Tensor, v: Tensor, request: Request, backend: str | None, *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    attend = _default(q, k, v, with_lse=with_lse) if backend is None else _named(backend, with_lse=with_lse)
    with full_precision(q.device):
        return attend(q, k, v, request)


Backend = Callable[[Tensor, Tensor, Tensor, Request], tuple[Tensor, Tensor | None]]


def _default(q: Tensor, k: Tensor, v: Tensor, *, with_lse: bool) -> Backend:
    """FlexAttention on CUDA, where it can, and pieces everywhere else."""
    blocked = partial(attend_blocked, with_lse=with_lse, asked="the default, blocked")
    if q.device.type != ON_FLEX:
        return blocked
    refusal = why_not(q, k, v, with_lse=with_lse)
    if not refusal:
        return partial(attend_flex, with_lse=with_lse)
    leave_receipt(
        "pattern_attention", asked="the default, flex", ran="blocked", reason=f"FlexAttention {refusal.split(';')[0]}"
    )
    return blocked


def _named(name: str, *, with_lse: bool) -> Backend:
    backends: dict[str, Backend] = {
        "dense": attend_dense,
        "blocked": partial(attend_blocked, with_lse=with_lse),
        "flex": partial(attend_flex, with_lse=with_lse),
    }
    if name not in backends:
        raise ValueError(f"pattern_attention: unknown backend {name!r}; known: {', '.join(sorted(backends))}")
    return backends[name]
