"""Inputs of Combiner's tests, and how closely results agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

BOTH_FORMS = pytest.mark.parametrize("causal", [True, False])


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def qkv(length: int, *, batch: int = 2, heads: int = 2, width: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(batch, heads, length, width, dtype=torch.float64, requires_grad=True) for _ in range(3))
    return q, k, v
