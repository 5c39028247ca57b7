"""Channel mixers with experts, restated as loops over groups, tokens and choices."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad import Mask
from subquad.layers.expert_mixer import ExpertMixer

Choose = Callable[[Tensor], dict[int, Tensor]]
"""From the probabilities (X,) of a token, its experts in the order of their choice, and their gates."""


def expert_output(module: ExpertMixer, x: Tensor, expert: int) -> Tensor:
    """x (..., D) through one expert."""
    activation = F.gelu if module.config.activation == "gelu" else F.relu
    hidden = activation(F.linear(x, module.experts.expand[expert], module.experts.expand_bias[expert]))
    return F.linear(hidden, module.experts.contract[expert], module.experts.contract_bias[expert])


def groups_of(module: ExpertMixer, x: Tensor, mask: Mask | None) -> list[list[tuple[int, int]]]:
    """Valid tokens of each group, in their order."""
    sequences = [
        [(b, t) for t in range(x.shape[1]) if mask is None or mask.valid is None or mask.valid[b, t]]
        for b in range(x.shape[0])
    ]
    return sequences if module.config.group == "sequence" else [[token for sequence in sequences for token in sequence]]


def by_loop(module: ExpertMixer, x: Tensor, mask: Mask | None, choose: Choose) -> tuple[Tensor, Tensor]:
    """y (B, L, D), and the loss of balance, not weighted."""
    config, losses = module.config, []
    y = [[torch.zeros_like(token) for token in sequence] for sequence in x]
    for tokens in groups_of(module, x, mask):
        seats = math.inf
        if config.capacity_factor is not None:
            share = config.choices * len(tokens) / config.experts
            seats = max(config.min_capacity, math.floor(share * config.capacity_factor))
        wanted, probabilities = Counter[int](), []
        for b, t in tokens:
            probabilities.append((module.router @ x[b, t]).softmax(dim=-1))
            for expert, gate in choose(probabilities[-1]).items():
                if wanted[expert] < seats:
                    y[b][t] = y[b][t] + gate * expert_output(module, x[b, t], expert)
                wanted[expert] += 1
        if tokens:
            mean = torch.stack(probabilities).mean(dim=0)
            shares = [wanted[expert] / (config.choices * len(tokens)) for expert in range(config.experts)]
            losses.append(config.experts * sum(share * mean[expert] for expert, share in enumerate(shares)))
    balance = torch.stack(losses).mean() if losses else x.new_zeros(())
    return torch.stack([torch.stack(sequence) for sequence in y]), balance


def assert_equals_the_loop(module: ExpertMixer, length: int, mask: Mask | None, choose: Choose) -> None:
    """Values, the loss of balance, and all gradients of both together, those of the router included."""
    module = module.double()
    x = torch.randn(2, length, module.router.shape[1], dtype=torch.float64, requires_grad=True)
    y, _, aux_loss = module(x, mask=mask)
    expected, balance = by_loop(module, x, mask, choose)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert aux_loss is not None
    torch.testing.assert_close(aux_loss, (module.config.balance_weight * balance).float())
    upstream, leaves = torch.randn_like(y), [x, *module.parameters()]
    totals = (y * upstream).sum() + aux_loss, (expected * upstream).sum() + module.config.balance_weight * balance
    found, wanted = (torch.autograd.grad(total, leaves) for total in totals)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
