"""Windows that run side by side give what each gives alone, and what torch's cells give."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from subquad.ops.local_recurrence import network as module
from subquad.ops.local_recurrence.network import GATES, CellName, local_recurrence, local_recurrence_by_windows

CELLS: list[CellName] = ["rnn", "gru", "lstm"]
WIDTH = 3


@given(
    cell=st.sampled_from(CELLS),
    window=st.integers(1, 6),
    length=st.sampled_from([1, 2, 3, 8, 11]),
    batch=st.integers(1, 3),
    bias=st.booleans(),
    numbers=st.sampled_from([1, 50, 10**6]),
)
def test_slices_equal_the_definition(
    cell: CellName, window: int, length: int, batch: int, bias: bool, numbers: int
) -> None:
    size = GATES[cell] * WIDTH
    tokens, weights = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((batch, length + window - 1, size), (size, WIDTH))
    )
    biases = torch.randn(size, dtype=torch.float64, requires_grad=True) if bias else None
    with patch.object(module, "SLICE", numbers):
        y = local_recurrence(tokens, weights, biases, cell=cell, window=window)
        expected = local_recurrence_by_windows(tokens, weights, biases, cell=cell, window=window)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        leaves = [tensor for tensor in (tokens, weights, biases) if tensor is not None]
        upstream = torch.randn_like(y)
        found, wanted = (
            torch.autograd.grad(out, leaves, upstream, allow_unused=True, materialize_grads=True)
            for out in (y, expected)
        )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("cell", "network"), [("rnn", nn.RNN), ("gru", nn.GRU), ("lstm", nn.LSTM)])
def test_cells_are_those_of_torch(cell: CellName, network: type[nn.RNN | nn.GRU | nn.LSTM]) -> None:
    layer = network(2, WIDTH, batch_first=True).double()
    x = torch.randn(2, 9, 2, dtype=torch.float64)
    inputs, weights, of_inputs, biases = layer.all_weights[0]
    y = local_recurrence(nn.functional.linear(x, inputs, of_inputs), weights, biases, cell=cell, window=4)
    expected = torch.stack([layer(x[:, end - 4 : end])[0][:, -1] for end in range(4, 10)], dim=1)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_an_empty_batch_gives_an_empty_batch() -> None:
    tokens, weights = torch.randn(0, 5, WIDTH, requires_grad=True), torch.randn(WIDTH, WIDTH)
    y = local_recurrence(tokens, weights, None, cell="rnn", window=2)
    y.sum().backward()
    assert y.shape == (0, 4, WIDTH)


def test_bfloat16_runs_in_float32() -> None:
    tokens, weights = torch.randn(2, 9, 3 * WIDTH).bfloat16(), torch.randn(3 * WIDTH, WIDTH).bfloat16()
    y = local_recurrence(tokens, weights, None, cell="gru", window=4)
    expected = local_recurrence(tokens.float(), weights.float(), None, cell="gru", window=4)
    assert torch.equal(y, expected.bfloat16())
