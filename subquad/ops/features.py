"""Feature maps φ for linear attention: φ(x)·φ(y) stands in for a similarity of x and y.

`elu_plus_one` is the Linear Transformer's (arXiv 2006.16236). The positive random features of FAVOR+ (arXiv 2009.14794)
estimate the softmax kernel without bias: with rows ω of a random matrix,

    φ(x) = m^(-1/2) exp(ω·x - |x|²/2)      E[φ(x)·φ(y)] = exp(x·y)
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, positive everywhere; exp(x) below 0, which keeps the small values that `elu(x) + 1` loses."""
    return torch.where(x > 0, x + 1, x.clamp_max(0).exp())


def orthogonal_features(
    count: int, width: int, *, norms: Literal["random", "constant"], generator: torch.Generator
) -> Tensor:
    """Random directions ω, float64 (count, width), orthogonal within each block of `width` rows.

    Args:
        count: m, number of rows.
        width: E.
        norms: "random" gives each row the length of an independent Gaussian vector, so that rows are marginally
            Gaussian; "constant" gives all the length √E.
        generator: source of randomness, on the CPU.
    """
    blocks = []
    for start in range(0, count, width):
        gaussian = torch.randn(width, width, generator=generator, dtype=torch.float64, device="cpu")
        orthogonal, triangular = torch.linalg.qr(gaussian)
        # Householder QR prefers some signs, which would bias the estimator; R's diagonal undoes that preference.
        orthogonal = orthogonal * triangular.diagonal().sign()
        blocks.append(orthogonal.T[: min(width, count - start)])
    directions = torch.cat(blocks)
    if norms == "constant":
        return directions * math.sqrt(width)
    lengths = torch.randn(count, width, generator=generator, dtype=torch.float64, device="cpu").norm(dim=1)
    return directions * lengths[:, None]


def positive_features(x: Tensor, directions: Tensor) -> Tensor:
    """The definition: unstabilised φ(x) (..., m) of x (..., E) with directions (m, E); unbiased, may overflow."""
    return torch.exp(x @ directions.T - x.square().sum(dim=-1, keepdim=True) / 2) / math.sqrt(directions.shape[0])


def query_features(q: Tensor, directions: Tensor, *, epsilon: float) -> Tensor:
    """φ of queries (B, H, L, E), each scaled by a factor of its own, which normalisation cancels; never overflows."""
    projected = q @ directions.T
    stabilised = projected - projected.detach().amax(dim=-1, keepdim=True)
    return (stabilised.exp() + epsilon) / math.sqrt(directions.shape[0])


def key_features(k: Tensor, directions: Tensor, *, epsilon: float, valid: Tensor | None) -> Tensor:
    """φ of keys (B, H, S, E), all scaled by one factor per example and head; for bidirectional use only.

    The factor comes from the largest exponent over all valid keys of the sequence (valid: bool (B, S)), hence from the
    future too. Features of invalid keys are 0.
    """
    exponents = k @ directions.T - k.square().sum(dim=-1, keepdim=True) / 2
    if valid is not None:
        exponents = exponents.masked_fill(~valid[:, None, :, None], -math.inf)
    largest = exponents.detach().amax(dim=(-2, -1), keepdim=True)
    largest = largest.masked_fill(largest == -math.inf, 0.0)  # an example without any valid key
    features = ((exponents - largest).exp() + epsilon) / math.sqrt(directions.shape[0])
    return features if valid is None else features.masked_fill(~valid[:, None, :, None], 0.0)
