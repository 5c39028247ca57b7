"""Functions of windows: what they compute, and what they cost."""

from __future__ import annotations

import pytest
import torch

from subquad.layers.compression import Convolution, Decoder, Kind, compression, convolution_cost


def test_equal_tokens_are_reproduced_by_pooling() -> None:
    token = torch.randn(2, 5, 1, 3)
    for kind in ("max", "mean", "most_used"):
        torch.testing.assert_close(compression(kind, 3, 4, ())(token.expand(-1, -1, 4, -1)), token[:, :, 0])


def test_the_largest_and_the_mean_are_taken_channel_by_channel() -> None:
    window = torch.tensor([[[[1.0, 6.0], [3.0, 2.0]]]])
    assert compression("max", 2, 2, ())(window).tolist() == [[[3.0, 6.0]]]
    assert compression("mean", 2, 2, ())(window).tolist() == [[[2.0, 4.0]]]


@pytest.mark.parametrize(("kind", "dilations"), [("convolution", ()), ("dilated", (1, 2))])
def test_zeros_become_zeros_and_a_window_is_read_whole(kind: Kind, dilations: tuple[int, ...]) -> None:
    function, size = compression(kind, 3, 4, dilations), 4 + sum(dilations)
    assert not function(torch.zeros(2, 5, size, 3)).any()
    windows = torch.randn(1, 1, size, 3, requires_grad=True)
    with torch.no_grad():
        for weight in function.parameters():
            weight.abs_()  # so that no ReLU hides a token
    (gradient,) = torch.autograd.grad(function(windows.abs()).sum(), windows)
    assert bool(gradient.any(dim=-1).all())


def test_a_decoder_makes_as_many_tokens_as_a_row_stands_for() -> None:
    assert Decoder(3, 4)(torch.randn(7, 3)).shape == (7, 4, 3)


@pytest.mark.parametrize("dilations", [(), (1,), (1, 2, 4)])
def test_the_price_knows_the_parameters(dilations: tuple[int, ...]) -> None:
    function = Convolution(5, 3, dilations)
    counted = sum(weight.numel() for weight in function.parameters())
    assert convolution_cost(5, 3, dilations, 7, 4).parameters == counted
