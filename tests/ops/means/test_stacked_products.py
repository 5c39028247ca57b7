"""Stacks of products are those of their matrices, however large they are."""

from __future__ import annotations

import pytest
import torch

from subquad.ops.means.stacked_products import add_stacked_product_, stacked_product
from subquad.ops.onednn import SMALLEST_PRODUCT


@pytest.mark.parametrize("size", [3, 200])
@pytest.mark.parametrize(("stacks", "others"), [((1, 1), (1, 1)), ((1, 1), (2, 3)), ((2, 1), (2, 3)), ((2, 3), (2, 3))])
def test_stacks_equal_plain_products(size: int, stacks: tuple[int, int], others: tuple[int, int]) -> None:
    assert (size**3 >= SMALLEST_PRODUCT) == (size == 200)
    a, b = torch.randn(*stacks, size, size), torch.randn(*others, size, size)
    expected = (a.double() @ b.double()).float()
    torch.testing.assert_close(stacked_product(a, b), expected, rtol=1e-4, atol=1e-4)
    whole = torch.ones(*others, 2 * size, size)
    add_stacked_product_(whole[:, :, size:], a, b)
    torch.testing.assert_close(whole[:, :, size:], expected + 1, rtol=1e-4, atol=1e-4)
    assert bool((whole[:, :, :size] == 1).all())
