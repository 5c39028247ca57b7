"""The private matrix product of oneDNN: there, right, and left alone where it doesn't serve."""

from __future__ import annotations

import pytest
import torch

from subquad.ops import onednn


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a build of torch without oneDNN")
def test_torch_still_has_the_private_operator_with_this_signature() -> None:
    assert onednn.available()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 5), (300, 400)])
def test_it_is_the_matrix_product(dtype: torch.dtype, rows: int, columns: int) -> None:
    a, b = torch.randn(rows, 64).to(dtype), torch.randn(columns, 64).to(dtype)
    torch.testing.assert_close(onednn.matmul(a, b), a @ b.mT)


def test_a_matrix_cut_from_wider_rows_is_served() -> None:
    a, b = torch.randn(300, 128)[:, :64], torch.randn(64, 800).T[:400]
    torch.testing.assert_close(onednn.matmul(a, b), a @ b.mT)


def test_without_the_operator_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "available", lambda: False)
    monkeypatch.setattr(onednn, "_linear", lambda a, b: pytest.fail("the operator was called"))
    a, b = torch.randn(300, 64), torch.randn(400, 64)
    assert torch.equal(onednn.matmul(a, b), torch.mm(a, b.mT))
