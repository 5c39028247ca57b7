"""Large tensors in large pages: the same tensors as torch's own."""

import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from subquad.ops import large_pages
from subquad.ops.large_pages import empty_like, zeros_like


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes the advice")
def test_the_library_offers_the_call() -> None:
    assert large_pages._advise() is not None


@pytest.mark.parametrize("advised", [True, False])
def test_large_tensors_are_like_those_of_torch(monkeypatch: pytest.MonkeyPatch, advised: bool) -> None:
    x = torch.randn(3, 64, 1024).transpose(0, 1)
    monkeypatch.setattr(large_pages, "LEAST_BYTES", 2**16)
    if not advised:
        monkeypatch.setattr(large_pages, "_advise", lambda: None)
    for made, right in ((empty_like(x), torch.empty_like(x)), (zeros_like(x), torch.zeros_like(x))):
        assert (made.shape, made.stride(), made.dtype) == (right.shape, right.stride(), right.dtype)
    assert not zeros_like(x).any()


def test_the_system_takes_the_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    advise = large_pages._advise()
    if advise is None or not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system has no large pages")
    answers = []
    monkeypatch.setattr(large_pages, "_advise", lambda: lambda *call: answers.append(advise(*call)))
    monkeypatch.setattr(large_pages, "LEAST_BYTES", 2**16)
    empty_like(torch.empty(2**16))
    assert answers == [0]


def test_tensors_without_memory_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "LEAST_BYTES", 0)
    with FakeTensorMode():
        assert empty_like(torch.empty(8)).shape == (8,)
