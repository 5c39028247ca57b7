"""A causal convolution of each channel for itself over a few tokens.

y_t = Σ_s w_s ⊙ x_{t-s}      0 <= s < K
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6
"""Added to a squared length before a vector is divided by it."""


def short_convolution_by_tokens(x: Tensor, weight: Tensor, before: Tensor | None = None) -> Tensor:
    """The definition, one token after the other. Arguments and result as in `short_convolution`."""
    reach = weight.shape[0] - 1
    past = x.new_zeros(x.shape[0], reach, x.shape[2]) if before is None else before
    tokens = [*past.unbind(dim=1), *x.unbind(dim=1)]
    rows = [
        torch.stack([weight[s] * tokens[t - s] for s in range(reach + 1)]).sum(dim=0) for t in range(reach, len(tokens))
    ]
    return torch.stack(rows, dim=1)


def short_convolution(x: Tensor, weight: Tensor, before: Tensor | None = None) -> Tensor:
    """The convolution, tap by tap.

    Args:
        x: (B, L, C).
        weight: (K, C); row s weighs the token s places back.
        before: (B, K - 1, C), the tokens before x; None for zeros.

    Returns:
        (B, L, C).
    """
    reach, length = weight.shape[0] - 1, x.shape[1]
    padded = F.pad(x, (0, 0, reach, 0)) if before is None else torch.cat((before, x), dim=1)
    y = padded[:, reach:] * weight[0]
    for s in range(1, reach + 1):
        y = torch.addcmul(y, padded[:, reach - s : reach - s + length], weight[s])
    return y


def unit_vectors(x: Tensor) -> Tensor:
    """X (..., E) divided by its length in the last dimension; a vector of 0 stays 0, with a finite gradient."""
    return x * (x.square().sum(dim=-1, keepdim=True) + EPSILON).rsqrt()
