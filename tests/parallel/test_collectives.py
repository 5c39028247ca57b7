"""Exchanges and sums of processes, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_on
from torch import Tensor

from subquad.parallel.collectives import enter_parts, exchange_counts, exchange_rows, scale_gradient, sum_parts

COUNTS = torch.tensor([[2, 0], [3, 1]])
"""Rows that process i sends to process j."""


def group() -> dist.ProcessGroup:
    found = dist.group.WORLD
    assert found is not None
    return found


def exchanged(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    sent, received = COUNTS[rank].tolist(), COUNTS[:, rank].tolist()
    rows = (100 * rank + torch.arange(sum(sent) * 2)).view(-1, 2).to(dtype).requires_grad_()
    arrived = exchange_rows(rows, sent, received, group())
    (arrived * (1 + rank)).sum().backward()
    assert rows.grad is not None
    return arrived.detach(), rows.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_go_to_their_processes_and_gradients_back(dtype: torch.dtype) -> None:
    (first, of_first), (second, of_second) = run_on(2, exchanged, dtype)
    assert first[:, 0].tolist() == [0, 2, 100, 102, 104]
    assert second[:, 0].tolist() == [106]
    assert of_first[:, 0].tolist() == [1, 1]
    assert of_second[:, 0].tolist() == [1, 1, 1, 2]


def exchanged_nothing() -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    counts = [[0, 3], [0, 0]]  # the second process sends nothing, and the first gets nothing
    sent, received = counts[rank], [row[rank] for row in counts]
    rows = torch.ones(sum(sent), 2, requires_grad=True)
    arrived = exchange_rows(rows, sent, received, group())
    arrived.sum().backward()
    assert rows.grad is not None
    return arrived.detach(), rows.grad


def test_a_process_without_rows_takes_part_in_both_directions() -> None:
    (first, of_first), (second, of_second) = run_on(2, exchanged_nothing)
    assert (first.shape, second.shape) == ((0, 2), (3, 2))
    assert (of_first.tolist(), of_second.shape) == ([[1.0, 1.0]] * 3, (0, 2))


def told_counts() -> Tensor:
    rank = dist.get_rank()
    return exchange_counts(10 * rank + torch.arange(6).view(2, 3), group())


def test_every_process_learns_what_comes() -> None:
    first, second = run_on(2, told_counts)
    assert first.tolist() == [[0, 1, 2], [10, 11, 12]]
    assert second.tolist() == [[3, 4, 5], [13, 14, 15]]


def parted(operation: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    x = torch.full((2,), 1.0 + dist.get_rank(), requires_grad=True)
    y = operation(x, group())
    (y * (3 + dist.get_rank())).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize(
    ("operation", "values", "gradients"), [(enter_parts, [1.0, 2.0], [7.0, 7.0]), (sum_parts, [3.0, 3.0], [3.0, 4.0])]
)
def test_parts_are_summed_in_one_direction(operation: Any, values: list[float], gradients: list[float]) -> None:
    found = run_on(2, parted, operation)
    assert [float(y[0]) for y, _ in found] == values
    assert [float(grad[0]) for _, grad in found] == gradients


def test_a_gradient_is_scaled_and_the_value_not() -> None:
    x = torch.ones(3, requires_grad=True)
    y = scale_gradient(x, 0.25)
    y.sum().backward()
    assert y.tolist() == [1.0] * 3
    assert x.grad is not None
    assert x.grad.tolist() == [0.25] * 3
