"""The device that stands for a GPU refuses what a GPU refuses."""

from __future__ import annotations

import pytest
import torch
from another_device import DEVICE, another_device, here, there


def test_tensors_of_two_devices_dont_meet() -> None:
    with another_device():
        x = torch.ones(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="tensors on both devices"):
            x.add(torch.ones(3))
        with pytest.raises(RuntimeError, match="tensors on both devices"):
            torch.ones(3)[torch.zeros(2, dtype=torch.int64, device=DEVICE)]


def test_numbers_and_indices_may_come_from_the_cpu() -> None:
    with another_device():
        x = torch.arange(3.0, device=DEVICE)
        assert (x * torch.tensor(2.0))[torch.tensor([2, 1])].tolist() == [4, 2]


def test_operators_of_the_cpu_alone_are_refused() -> None:
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with another_device(), pytest.raises(RuntimeError, match="runs on the CPU alone"):
        operator(*there((torch.ones(1, 1, 2, 4),) * 3))


def test_what_was_made_there_stays_there() -> None:
    with another_device():
        x = torch.tensor([1.0, 2.0], device=DEVICE)
        y = x.clone().requires_grad_()
        (y * x).sum().backward()
        assert y.grad is not None
        assert y.grad.device == DEVICE
        assert y.to("cpu").device.type == "cpu"
        assert here(y.grad).tolist() == [1, 2]


def test_numpy_has_no_view_of_it() -> None:
    with another_device(), pytest.raises(RuntimeError, match="numpy"):
        torch.ones(3, device=DEVICE).numpy()
