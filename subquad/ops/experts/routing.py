"""Which tokens go to which expert: choices in the order of the tokens, seats where experts have a capacity, losses.

A group is a stretch of tokens that share the seats of the experts: all tokens of a call, or those of a sequence.
G groups of N tokens, X experts, k choices of each token.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.precision import full_precision, wide_dtype


class ExpertRows(NamedTuple):
    """The choices that are computed, expert by expert, and of one expert in the order of groups, tokens and choices.

    Attributes:
        tokens: int64 (M,), which token, of G N.
        choices: int64 (M,), which of its k choices.
        counts: X numbers of rows.
        dropped: choices of valid tokens whose expert had no seat left.
    """

    tokens: Tensor
    choices: Tensor
    counts: tuple[int, ...]
    dropped: int


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """The router, in float32 or wider whatever autocast says.

    Args:
        x: (..., D).
        weight: (X, D).

    Returns:
        (..., X).
    """
    wide = wide_dtype(x)
    with full_precision(x.device):
        return F.linear(x.to(wide), weight.to(wide))


def expert_rows_by_tokens(
    chosen: Tensor,
    experts: int,
    *,
    valid: Tensor | None = None,
    capacity: Tensor | None = None,
    priority: Tensor | None = None,
) -> ExpertRows:
    """The definition: token after token takes a seat, as long as there is one. Arguments as in `expert_rows`."""
    groups, length, _ = chosen.shape
    wish = torch.zeros(groups, length) if priority is None else priority
    turns = [sorted(range(length), key=[-rank for rank in ranks].__getitem__) for ranks in wish.tolist()]
    rows: list[list[tuple[int, int]]] = [[] for _ in range(experts)]
    dropped = 0
    for group in range(groups):
        taken: Counter[int] = Counter()
        for token in turns[group]:
            if valid is not None and not valid[group, token]:
                continue
            for choice, expert in enumerate(chosen[group, token].tolist()):
                if capacity is not None and taken[expert] >= int(capacity[group]):
                    dropped += 1
                    continue
                taken[expert] += 1
                rows[expert].append((group * length + token, choice))
    seated = torch.tensor([row for of_expert in rows for row in of_expert], dtype=torch.int64).view(-1, 2)
    tokens, choices = seated.to(chosen.device).unbind(dim=1)
    return ExpertRows(tokens, choices, tuple(len(of_expert) for of_expert in rows), dropped)


def expert_rows(
    chosen: Tensor,
    experts: int,
    *,
    valid: Tensor | None = None,
    capacity: Tensor | None = None,
    priority: Tensor | None = None,
) -> ExpertRows:
    """Sort choices by expert; a stable sort keeps the order of the tokens, so the first ones have the seats.

    Args:
        chosen: int64 (G, N, k), experts of each token.
        experts: X.
        valid: bool (G, N); the other tokens go nowhere and take no seat.
        capacity: int64 (G,), seats of every expert in a group; None for as many as are wanted.
        priority: (G, N); tokens take their seats from the largest to the smallest. None for the order of the tokens.
    """
    groups, length, top_k = chosen.shape
    turns = None if priority is None else priority.argsort(dim=1, descending=True, stable=True)
    if turns is not None:
        chosen = chosen.gather(1, turns[..., None].expand_as(chosen))
        valid = None if valid is None else valid.gather(1, turns)
    group = torch.arange(groups, device=chosen.device)
    runs = chosen * groups + group[:, None, None]  # an expert's seats in a group are a run of the sorted choices
    if valid is not None:
        runs = runs.masked_fill(~valid[..., None], experts * groups)  # behind all others
    flat = runs.flatten()
    order = flat.argsort(stable=True)
    sizes = torch.bincount(flat, minlength=experts * groups)[: experts * groups]
    order = order[: int(sizes.sum())]
    wanted = order.numel()
    if capacity is not None:
        starts = sizes.cumsum(dim=0) - sizes
        rank = torch.arange(wanted, device=chosen.device) - starts.repeat_interleave(sizes)
        seats = capacity.repeat(experts)
        order = order[rank < seats.repeat_interleave(sizes)]
        sizes = torch.minimum(sizes, seats)
    counts = sizes.view(experts, groups).sum(dim=1).tolist()
    tokens = order // top_k
    if turns is not None:
        tokens = (turns + group[:, None] * length).flatten()[tokens]
    return ExpertRows(tokens, order % top_k, tuple(counts), wanted - order.numel())


def seats(tokens: Tensor, *, experts: int, top_k: int, factor: float, least: int) -> Tensor:
    """Seats of every expert, int64 (G,): `factor` times an equal share of the choices, rounded down.

    Args:
        tokens: int64 (G,), valid tokens of each group.
        experts: X.
        top_k: choices of each token.
        factor: 1 for just as many seats as choices.
        least: seats that an expert has in any case.
    """
    return (tokens.double() * (top_k * factor) / experts).long().clamp_min(least)


def balance_loss_by_tokens(probabilities: Tensor, chosen: Tensor, valid: Tensor | None = None) -> Tensor:
    """The definition, group by group. Arguments and result as in `balance_loss`."""
    losses = []
    for group in range(chosen.shape[0]):
        kept = [n for n in range(chosen.shape[1]) if valid is None or valid[group, n]]
        if not kept:
            continue
        wanted = Counter(expert for n in kept for expert in chosen[group, n].tolist())
        mean = probabilities[group, kept].mean(dim=0)
        shares = [wanted[expert] / (len(kept) * chosen.shape[2]) for expert in range(len(mean))]
        losses.append(len(mean) * sum(share * mean[expert] for expert, share in enumerate(shares)))
    return torch.stack(losses).mean() if losses else probabilities.sum() * 0


def balance_loss(probabilities: Tensor, chosen: Tensor, valid: Tensor | None = None) -> Tensor:
    """X Σ_i f_i P_i: f_i the share of the choices that expert i gets, P_i its mean probability.

    Differentiable through P alone; 1 where both are equal for all experts.

    Args:
        probabilities: (G, N, X).
        chosen: int64 (G, N, k), before any of them is dropped.
        valid: bool (G, N); the other tokens don't count.

    Returns:
        The mean over the groups that have a token; 0 where none has.
    """
    kept = torch.ones_like(probabilities[..., 0]) if valid is None else valid.to(probabilities.dtype)
    tokens, top_k = kept.sum(dim=1, keepdim=True), chosen.shape[2]
    nothing = tokens.new_zeros(chosen.shape[0], probabilities.shape[2])
    wanted = nothing.scatter_add(1, chosen.flatten(1), kept.repeat_interleave(top_k, dim=1))
    share = wanted / (tokens * top_k).clamp_min(1)
    groups = (tokens > 0).sum().clamp_min(1)
    scale = probabilities.shape[2] / (tokens.clamp_min(1) * groups)
    summed = probabilities if valid is None else probabilities.masked_fill(~valid[..., None], 0.0)
    return (share * scale * summed.sum(dim=1)).sum()


def z_loss(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """The mean over valid tokens of the squared logarithm of the router's normaliser; 0 without tokens.

    Args:
        logits: (G, N, X).
        valid: bool (G, N).
    """
    normalisers = logits.logsumexp(dim=-1)
    if valid is None:
        return normalisers.square().sum() / max(1, normalisers.numel())
    return normalisers.masked_fill(~valid, 0.0).square().sum() / valid.sum().clamp_min(1)
