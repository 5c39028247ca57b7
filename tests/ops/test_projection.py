"""The linear layer by oneDNN is that of torch, whatever stands around it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.layers.projection import Projection
from subquad.ops import onednn, projection
from subquad.ops.projection import SMALLEST_PROJECTION, project

ROWS, WIDTH, OUT = 2 * 512, 192, 256
"""Of a projection large enough for oneDNN."""


@pytest.fixture(autouse=True)
def outruns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where oneDNN is faster, on every one."""
    for module in (onednn, projection):
        monkeypatch.setattr(module, "outruns_mm", lambda: True)


def _drawn(out: int = OUT) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, ROWS // 2, WIDTH), (out, WIDTH), (out,))
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return x.requires_grad_(), (weight / WIDTH**0.5).requires_grad_(), bias.requires_grad_()


def _runs_on_onednn(y: Tensor) -> bool:
    return y.grad_fn is not None and "_Projection" in y.grad_fn.name()


@pytest.mark.parametrize("out", [OUT, WIDTH - 8])
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients_of_both_orders_equal_those_of_linear(out: int, biased: bool) -> None:
    x, weight, bias = _drawn(out)
    leaves = (x, weight, bias) if biased else (x, weight)
    assert ROWS * WIDTH * out >= SMALLEST_PROJECTION
    found = []
    for layer in (project, F.linear):
        y = layer(*leaves)
        assert _runs_on_onednn(y) == (layer is project)
        first = torch.autograd.grad(y.square().mean(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g.square().sum() for g in first), torch.zeros(())), leaves)
        found.append((y, *first, *second))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_small_wide_and_narrowed_ones_are_left_to_torch() -> None:
    x, weight, bias = _drawn()
    assert not _runs_on_onednn(project(x[:, :64], weight, bias))
    assert not _runs_on_onednn(project(x.double(), weight.double(), bias.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = project(x, weight, bias)
    assert y.dtype == torch.bfloat16
    assert not _runs_on_onednn(y)


def test_function_transforms_see_through_it() -> None:
    x, weight, bias = (leaf.detach() for leaf in _drawn())
    found = torch.func.grad(lambda w: project(x, w, bias).square().mean())(weight)
    expected = torch.func.grad(lambda w: F.linear(x, w, bias).square().mean())(weight)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_exported_and_fake_tensors_meet_torchs_own_operator() -> None:
    layer = Projection(WIDTH, OUT)
    program = torch.export.export(layer, (torch.randn(2, ROWS // 2, WIDTH),))
    assert any(node.target is torch.ops.aten.linear.default for node in program.graph.nodes)
    assert not any("mkldnn" in str(node.target) for node in program.graph.nodes)


def test_the_layer_is_a_linear_layer_of_torch_with_its_names() -> None:
    layer, plain = Projection(4, 3), torch.nn.Linear(4, 3)
    assert isinstance(layer, torch.nn.Linear)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4)
    assert torch.equal(layer(x), plain(x))


def test_where_mm_is_as_fast_torch_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "outruns_mm", lambda: False)
    x, weight, bias = _drawn()
    assert not _runs_on_onednn(project(x, weight, bias))
