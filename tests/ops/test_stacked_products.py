"""Stacks of products are those of their matrices, however large they are."""

from __future__ import annotations

import pytest
import torch

from subquad.ops import onednn, stacked_products
from subquad.ops.stacked_products import SMALLEST_OF_SEVERAL, add_stacked_product_, stacked_product


@pytest.mark.parametrize("size", [3, 200])
@pytest.mark.parametrize(
    ("stacks", "others"),
    [((1, 1), (1, 1)), ((1, 1), (2, 3)), ((2, 1), (2, 3)), ((2, 3), (2, 3)), ((1,), (1,)), ((3,), (3,))],
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("outruns", [False, True], ids=["mm", "oneDNN"])
def test_stacks_equal_plain_products(
    monkeypatch: pytest.MonkeyPatch,
    outruns: bool,
    size: int,
    stacks: tuple[int, ...],
    others: tuple[int, ...],
    transposed: bool,
) -> None:
    for module in (onednn, stacked_products):
        monkeypatch.setattr(module, "outruns_mm", lambda: outruns)
    assert (size**3 >= SMALLEST_OF_SEVERAL) == (size == 200)
    a, b = torch.randn(*stacks, size, size), torch.randn(*others, size, size)
    a, b = (a.mT, b.mT) if transposed else (a, b)
    expected = (a.double() @ b.double()).float()
    torch.testing.assert_close(stacked_product(a, b), expected, rtol=1e-4, atol=1e-4)
    whole = torch.ones(*others, 2 * size, size)
    add_stacked_product_(whole[..., size:, :], a, b)
    torch.testing.assert_close(whole[..., size:, :], expected + 1, rtol=1e-4, atol=1e-4)
    assert bool((whole[..., :size, :] == 1).all())
