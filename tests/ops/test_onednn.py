import pytest
import torch

from subquad.ops import onednn
from subquad.ops.onednn import add_product_, has_onednn, logistic_product, outruns_mm, product, product_over_rows


@pytest.fixture(params=[False, True], ids=["mm", "oneDNN"], autouse=True)
def faster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries on every machine."""
    monkeypatch.setattr(onednn, "outruns_mm", lambda: request.param)


def test_this_build_of_torch_offers_the_private_operator() -> None:
    assert has_onednn()


@pytest.mark.parametrize("shape", [(3, 5, 2), (256, 64, 256)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_products_are_those_of_plain_matrices(shape: tuple[int, int, int], transposed: bool, wide: bool) -> None:
    rows, inner, columns = shape
    a, bias = torch.randn(rows, inner), torch.randn(columns)
    extra = 3 if wide else 0
    b = (
        torch.randn(inner, columns + extra).T[:columns]
        if transposed
        else torch.randn(columns, inner + extra)[:, :inner]
    )
    expected = (a.double() @ b.double().T + bias.double()).float()
    torch.testing.assert_close(product(a, b, bias), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(product(a, b), expected - bias, atol=1e-4, rtol=1e-4)


def test_float64_keeps_its_precision() -> None:
    a, b = torch.randn(200, 100, dtype=torch.float64), torch.randn(200, 100, dtype=torch.float64)
    torch.testing.assert_close(product(a, b), a @ b.T, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shape", [(5, 3, 2), (300, 200, 256), (300, 256, 200), (90, 1500, 700)])
def test_products_over_rows_and_added_ones_are_those_of_plain_matrices(shape: tuple[int, int, int]) -> None:
    rows, first, second = shape
    a, b = torch.randn(rows, first), torch.randn(rows, second)
    expected = a.double().T @ b.double()
    torch.testing.assert_close(product_over_rows(a, b), expected.float(), atol=1e-3, rtol=1e-4)
    target = torch.ones(first, second)
    add_product_(target, a.T, b.T)
    torch.testing.assert_close(target, (1 + expected).float(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("rows", [3, 1024])
def test_the_logistic_function_follows_the_product(rows: int) -> None:
    a, b, bias = torch.randn(rows, 64), torch.randn(64, 64), torch.randn(64)
    expected = (a.double() @ b.double().T + bias.double()).sigmoid().float()
    torch.testing.assert_close(logistic_product(a, b, bias), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("vectors", "intel", "outruns"),
    [("AVX512", False, True), ("AVX512", True, False), ("AVX2", False, False), ("DEFAULT", False, False)],
)
def test_it_outruns_mm_where_mm_leaves_wide_vectors_alone(
    monkeypatch: pytest.MonkeyPatch, vectors: str, intel: bool, outruns: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(onednn, "made_by_intel", lambda: intel)
    assert outruns_mm() is outruns


def test_a_compiler_chooses_its_products_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not has_onednn()
    assert not outruns_mm()
