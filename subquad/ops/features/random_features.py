"""Feature maps φ for linear attention, as definitions: φ(x)·φ(y) stands in for a similarity of x and y.

`elu_plus_one` is the Linear Transformer's (arXiv 2006.16236). The random features of FAVOR+ (arXiv 2009.14794) estimate
the softmax kernel without bias: with rows ω of a random matrix Ω whose rows are Gaussian,

    positive        φ(x) = m^(-1/2) exp(ω·x - |x|²/2)
    hyperbolic      φ(x) = (2m)^(-1/2) [exp(ω·x - |x|²/2), exp(-ω·x - |x|²/2)]
    trigonometric   φ(x) = m^(-1/2) [exp(|x|²/2) cos ω·x, exp(|x|²/2) sin ω·x]        E[φ(x)·φ(y)] = exp(x·y)

These overflow; `maps.py` has the forms that don't.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, positive everywhere; exp(x) below 0, which keeps the small values that `elu(x) + 1` loses."""
    return torch.where(x > 0, x + 1, x.clamp_max(0).exp())


def positive_features(x: Tensor, directions: Tensor) -> Tensor:
    """exp(ω·x - |x|²/2), (..., m) of x (..., E) with directions (m, E)."""
    return torch.exp(x @ directions.mT - _half_square(x)) / math.sqrt(directions.shape[0])


def hyperbolic_features(x: Tensor, directions: Tensor) -> Tensor:
    """Positive features of both signs of every direction, (..., 2 m)."""
    return torch.cat((positive_features(x, directions), positive_features(x, -directions)), dim=-1) / math.sqrt(2)


def trigonometric_features(x: Tensor, directions: Tensor) -> Tensor:
    """exp(|x|²/2) cos and sin of ω·x, (..., 2 m); of both signs."""
    products = x @ directions.mT
    waves = torch.cat((products.cos(), products.sin()), dim=-1)
    return waves * torch.exp(_half_square(x)) / math.sqrt(directions.shape[0])


def relu_features(x: Tensor, directions: Tensor, epsilon: float) -> Tensor:
    """max(ω·x, 0) + ε, (..., m): the generalised kernel of ReLU, which is not that of softmax."""
    return ((x @ directions.mT).relu() + epsilon) / math.sqrt(directions.shape[0])


def plain_relu_features(x: Tensor, epsilon: float) -> Tensor:
    """max(x, 0) + ε, (..., E): the kernel of ReLU without directions."""
    return x.relu() + epsilon


def random_directions(
    count: int,
    width: int,
    *,
    orthogonal: bool = True,
    norms: Literal["random", "constant"] = "random",
    generator: torch.Generator,
) -> Tensor:
    """Random directions ω, float64 (count, width).

    Args:
        count: m, number of rows; may be 0.
        width: E.
        orthogonal: rows are orthogonal within each block of `width` of them; else they are independent.
        norms: "random" gives each row the length of an independent Gaussian vector, so that rows are marginally
            Gaussian; "constant" gives all the length √E.
        generator: source of randomness, on the CPU.
    """
    units = _orthogonal_units(count, width, generator) if orthogonal else _gaussian(count, width, generator)
    if norms == "constant":
        return units * (math.sqrt(width) / units.norm(dim=1, keepdim=True))
    return units * _gaussian(count, width, generator).norm(dim=1, keepdim=True) if orthogonal else units


def _orthogonal_units(count: int, width: int, generator: torch.Generator) -> Tensor:
    blocks = [_gaussian(0, width, generator)]
    for start in range(0, count, width):
        orthogonal, triangular = torch.linalg.qr(_gaussian(width, width, generator))
        # Householder QR prefers some signs, which would bias the estimator; R's diagonal undoes that preference.
        orthogonal = orthogonal * triangular.diagonal().sign()
        blocks.append(orthogonal.T[: min(width, count - start)])
    return torch.cat(blocks)


def _gaussian(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, width, generator=generator, dtype=torch.float64, device="cpu")


def _half_square(x: Tensor) -> Tensor:
    return x.square().sum(dim=-1, keepdim=True) / 2
