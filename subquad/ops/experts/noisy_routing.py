"""Routing by noisy probabilities, and the losses that balance it: importance and load.

    p = softmax(l + ε)     ε_i from a normal distribution of standard deviation 1 / X
    importance_i = Σ_x softmax(l)_i            load_i = Σ_x Φ((l_i - θ) X)     θ: the k-th largest of l + ε
    loss = (variation(importance)² + variation(load)²) / 2                    variation: standard deviation / mean

l are the logits of an item x for X experts, of which it goes to k; sums are over the items of a group, deviations over
all experts. The load is the chance, with other noise, to be among the k; it has a gradient, which a count hasn't.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from subquad.ops.recomputed import recomputed


def add_noise(logits: Tensor) -> Tensor:
    """Logits (..., X) with noise of standard deviation 1 / X, drawn from torch's generator."""
    return logits + torch.randn_like(logits) / logits.shape[-1]


def importance_load_loss_by_items(logits: Tensor, noisy: Tensor, top_k: int, valid: Tensor | None = None) -> Tensor:
    """The definition, item by item. Arguments and result as in `importance_load_loss`."""
    losses = []
    for group in range(logits.shape[0]):
        importance, load = (logits.new_zeros(logits.shape[2]) for _ in range(2))
        items = [n for n in range(logits.shape[1]) if valid is None or valid[group, n]]
        for n in items:
            threshold = noisy[group, n].sort(descending=True).values[top_k - 1]
            importance = importance + logits[group, n].softmax(dim=-1)
            chance = torch.distributions.Normal(threshold, 1 / logits.shape[2]).cdf(logits[group, n])
            load = load + chance
        if items:
            variations = [((x - x.mean()) ** 2).mean() / x.mean() ** 2 for x in (importance, load)]
            losses.append((variations[0] + variations[1]) / 2)
    return torch.stack(losses).mean() if losses else (logits.sum() + noisy.sum()) * 0


def importance_load_loss(logits: Tensor, noisy: Tensor, top_k: int, valid: Tensor | None = None) -> Tensor:
    """How unevenly the experts are used; 0 where all are used alike. Autograd keeps the logits alone.

    Args:
        logits: l (G, N, X), float32 or wider.
        noisy: l + ε, likewise; l itself where there is no noise.
        top_k: k, experts of an item.
        valid: bool (G, N); the other items don't count.

    Returns:
        The mean over the groups that have an item; 0 where none has.
    """
    return recomputed(partial(_loss, top_k=top_k, valid=valid), logits, noisy)


def _loss(logits: Tensor, noisy: Tensor, *, top_k: int, valid: Tensor | None) -> Tensor:
    threshold = noisy.topk(top_k, dim=-1).values[..., -1:]
    used = logits.softmax(dim=-1), torch.special.ndtr((logits - threshold) * logits.shape[-1])
    if valid is not None:
        used = tuple(x.masked_fill(~valid[..., None], 0.0) for x in used)
    sums = torch.stack([x.sum(dim=1) for x in used])  # (2, G, X)
    mean = sums.mean(dim=-1, keepdim=True)
    variations = ((sums - mean) / torch.where(mean > 0, mean, 1.0)).square().mean(dim=-1)
    items = valid.sum(dim=1) if valid is not None else torch.full_like(sums[0, :, 0], logits.shape[1])
    return variations.sum() / (2 * (items > 0).sum().clamp_min(1))
