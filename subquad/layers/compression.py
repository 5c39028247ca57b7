"""Functions that make one row of a window of tokens: the compression functions of the Compressive Transformer.

largest, mean:  channel by channel
convolution:    y = Σ_t W_t x_t over the `kernel` tokens of the window, without bias
dilated:        before that, for each dilation d: x_t ← ReLU(A x_t + B x_(t+d)), which shortens the window by d
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.costs import Cost
from subquad.ops.projection import project

Kind = Literal["max", "mean", "convolution", "dilated", "most_used"]


class Compression(nn.Module, ABC):
    """A function of windows."""

    @abstractmethod
    def forward(self, windows: Tensor) -> Tensor:
        """Rows (B, R, D) of windows (B, R, W, D)."""


class Largest(Compression):
    """The largest value in each channel."""

    def forward(self, windows: Tensor) -> Tensor:
        """Rows (B, R, D) of windows (B, R, W, D)."""
        return windows.amax(dim=2)


class Mean(Compression):
    """The mean in each channel."""

    def forward(self, windows: Tensor) -> Tensor:
        """Rows (B, R, D) of windows (B, R, W, D)."""
        return windows.mean(dim=2)


class Convolution(Compression):
    """A convolution, behind dilated ones of two tokens each where there are any."""

    def __init__(self, embed_dim: int, kernel: int, dilations: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.dilations = dilations
        self.dilated = nn.ParameterList(torch.empty(embed_dim, 2 * embed_dim) for _ in dilations)
        self.weight = nn.Parameter(torch.empty(embed_dim, kernel * embed_dim))
        self.initialise()

    def initialise(self) -> None:
        """Draw all weights, with variance 1 / fan-in."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, windows: Tensor) -> Tensor:
        """Rows (B, R, D) of windows (B, R, W, D)."""
        for dilation, weight in zip(self.dilations, self.dilated, strict=True):
            pairs = torch.cat((windows[:, :, :-dilation], windows[:, :, dilation:]), dim=-1)
            windows = F.relu(project(pairs, weight))
        return project(windows.flatten(2), self.weight)


def compression(kind: Kind, embed_dim: int, kernel: int, dilations: tuple[int, ...]) -> Compression:
    """The function by its name; of the windows of one token that usage chooses the mean is the token."""
    if kind in ("convolution", "dilated"):
        return Convolution(embed_dim, kernel, dilations)
    return Largest() if kind == "max" else Mean()


class Decoder(nn.Module):
    """A transposed convolution without overlap: the `rate` tokens that a row's window begins with."""

    def __init__(self, embed_dim: int, rate: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rate * embed_dim, embed_dim))
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights, with variance 1 / fan-in."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, rows: Tensor) -> Tensor:
        """Tokens (N, rate, D) of rows (N, D)."""
        return project(rows, self.weight).unflatten(-1, (-1, rows.shape[-1]))


def convolution_cost(embed_dim: int, kernel: int, dilations: tuple[int, ...], rows: int, dtype_bytes: int) -> Cost:
    """The price of `Convolution` for that many rows: autograd keeps what each product reads, and each ReLU's result."""
    window, products, kept, weights = kernel + sum(dilations), 0, 0, kernel * embed_dim**2
    for dilation in dilations:
        window -= dilation
        products += 2 * window * embed_dim**2
        kept += 3 * window * embed_dim
        weights += 2 * embed_dim**2
    kept += 0 if dilations else kernel * embed_dim
    return Cost(
        flops=2 * rows * (products + kernel * embed_dim**2),
        activation_bytes=dtype_bytes * rows * kept,
        parameters=weights,
    )
