"""Feature maps as linear attention runs them: slice by slice, with gradients from the features alone.

A map turns rows x (..., E) into features (..., F). Those of queries may carry any positive factor per row, and those of
keys one for all (such as the m^(-1/2) of the definitions, which is left out), since normalisation cancels both. Keys
whose features are exponentials come in two steps: `prepare` tells the largest exponent of every row, its peak, and
`finish` divides by exp(reference), which the caller chooses no smaller than the peak, so that nothing overflows. Peaks
and references are constants to the gradient. The definitions are in `random_features.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.onednn import product


class Prepared(NamedTuple):
    """Features of keys before the last step.

    Attributes:
        values: (..., F), or fewer columns that `finish` expands.
        shift: (..., 1), what brings the largest exponent of the row to 0.
        peak: (..., 1), the largest exponent; None for maps without exponents.
    """

    values: Tensor
    shift: Tensor | None = None
    peak: Tensor | None = None


class FeatureMap(ABC):
    """A map of rows to features."""

    exponential: bool = False
    """Whether the features of keys have peaks, and sums of them a reference."""

    @abstractmethod
    def count(self, width: int) -> int:
        """F, for rows of this width."""

    @abstractmethod
    def queries(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Features (..., F) of rows x (..., E), up to a positive factor per row; may be written to `out`."""

    def prepare(self, x: Tensor, out: Tensor | None = None) -> Prepared:
        """The features of keys up to the division by exp(reference); may be written to `out` (..., F)."""
        return Prepared(self.queries(x, out))

    def finish(self, prepared: Prepared, reference: Tensor | None) -> Tensor:
        """The features of keys, relative to exp(reference) (..., 1); uses the memory of what was prepared."""
        return prepared.values

    @abstractmethod
    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, out: Tensor, *, keys: bool) -> Tensor:
        """Gradient of x from the features and their gradient; it may use the memory of both.

        Args:
            x: (..., E).
            features: (..., F), of x.
            grad: (..., F), their gradient.
            out: (..., E), may be written to and returned.
            keys: whether the features are those of keys.
        """

    def write_gradient(self, x: Tensor, features: Tensor, grad: Tensor, place: Tensor, *, keys: bool) -> None:
        """Write the gradient of x to its place (..., E), of any floating dtype; the rest as in `gradient`."""
        found = self.gradient(x, features, grad, place, keys=keys)
        if found is not place:
            place.copy_(found)


@dataclass(frozen=True)
class Ready(FeatureMap):
    """x are features already."""

    def count(self, width: int) -> int:
        """E."""
        return width

    def queries(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Nothing to do."""
        return x

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, out: Tensor, *, keys: bool) -> Tensor:
        """Nothing to do."""
        return grad


@dataclass(frozen=True)
class EluPlusOne(FeatureMap):
    """elu(x) + 1 = exp(min(x, 0)) + max(x, 0), whose derivative is the smaller of it and 1."""

    def count(self, width: int) -> int:
        """E."""
        return width

    def queries(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The derivative of elu, exp(min(x, 0)), times max(x, 0) + 1, in one pass."""
        rectified = torch.clamp_min(x, 0, out=out).add_(1)
        return torch.ops.aten.elu_backward.grad_input(rectified, 1, 1, 1, False, x, grad_input=rectified)

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, out: Tensor, *, keys: bool) -> Tensor:
        """Times the derivative."""
        return torch.mul(features.clamp_(max=1), grad, out=out)


@dataclass(frozen=True)
class PlainRelu(FeatureMap):
    """max(x, 0) + ε, the kernel of ReLU without directions.

    Attributes:
        epsilon: ε.
    """

    epsilon: float

    def count(self, width: int) -> int:
        """E."""
        return width

    def queries(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Rectified."""
        return torch.clamp_min(x, 0, out=out).add_(self.epsilon)

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, out: Tensor, *, keys: bool) -> Tensor:
        """Through what is above 0."""
        return torch.mul(x > 0, grad, out=out)


@dataclass(frozen=True, eq=False)
class Projected(FeatureMap):
    """Features of the products with random directions.

    Attributes:
        directions: Ω √σ, (m, E); σ = 1 / √E for the softmax of q·k / √E.
        square_scale: σ, the factor of |x|².
    """

    directions: Tensor
    square_scale: float

    def count(self, width: int) -> int:
        """One for each direction."""
        return self.directions.shape[0]

    def _products(self, x: Tensor) -> Tensor:
        return product(x.flatten(0, -2), self.directions).view(*x.shape[:-1], -1)

    def _half_square(self, x: Tensor) -> Tensor:
        return x.square().sum(dim=-1, keepdim=True).mul_(self.square_scale / 2)

    def _from_products(self, x: Tensor, grad: Tensor, square: Tensor | None, out: Tensor) -> Tensor:
        """Gradient of x from that of the products, and from that of σ|x|²/2 (..., 1)."""
        of_x = product(grad.flatten(0, -2), self.directions.mT).view(out.shape)
        return of_x if square is None else torch.addcmul(of_x, square, x, value=self.square_scale, out=out)


class PositiveRandom(Projected):
    """exp(ω·x - |x|²/2), positive features of the softmax kernel."""

    exponential = True

    def queries(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Without |x|², a factor of the row; nor that of the largest exponent."""
        products = self._products(x)
        return products.sub_(products.amax(dim=-1, keepdim=True)).exp_()

    def prepare(self, x: Tensor, out: Tensor | None = None) -> Prepared:
        """Products with the directions, and the largest exponents."""
        products = self._products(x)
        largest = products.amax(dim=-1, keepdim=True)
        return Prepared(products, -largest, largest - self._half_square(x))

    def finish(self, prepared: Prepared, reference: Tensor | None) -> Tensor:
        """Exponentials."""
        return prepared.values.add_(_shift(prepared, reference)).exp_()

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, out: Tensor, *, keys: bool) -> Tensor:
        """Through the exponential, and the products."""
        grad = grad.mul_(features)
        return self._from_products(x, grad, grad.sum(dim=-1, keepdim=True).neg_() if keys else None, out)


class HyperbolicRandom(Projected):
    """exp(±ω·x - |x|²/2): every direction with both signs, positive and of lower variance."""

    exponential = True

    def count(self, width: int) -> int:
        """2 m."""
        return 2 * self.directions.shape[0]

    def queries(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Without |x|², a factor of the row; nor that of the largest exponent."""
        products = self._products(x)
        return _both_signs(products, -products.abs().amax(dim=-1, keepdim=True))

    def prepare(self, x: Tensor, out: Tensor | None = None) -> Prepared:
        """Products with the directions, and the largest exponents."""
        products = self._products(x)
        largest = products.abs().amax(dim=-1, keepdim=True)
        return Prepared(products, -largest, largest - self._half_square(x))

    def finish(self, prepared: Prepared, reference: Tensor | None) -> Tensor:
        """Exponentials."""
        return _both_signs(prepared.values, _shift(prepared, reference))

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, out: Tensor, *, keys: bool) -> Tensor:
        """Through the exponential, and the products."""
        plus, minus = grad.mul_(features).chunk(2, dim=-1)
        square = grad.sum(dim=-1, keepdim=True).neg_() if keys else None
        return self._from_products(x, plus - minus, square, out)


class TrigonometricRandom(Projected):
    """exp(|x|²/2) cos ω·x and exp(|x|²/2) sin ω·x: unbiased too, but signed; sums of weights may vanish."""

    exponential = True

    def count(self, width: int) -> int:
        """2 m."""
        return 2 * self.directions.shape[0]

    def queries(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Waves, without the factor of the row."""
        products = self._products(x)
        return torch.cat((products.cos(), products.sin()), dim=-1)

    def prepare(self, x: Tensor, out: Tensor | None = None) -> Prepared:
        """Waves, and the exponents of their factors."""
        return Prepared(self.queries(x), None, self._half_square(x))

    def finish(self, prepared: Prepared, reference: Tensor | None) -> Tensor:
        """Waves times their factors."""
        assert prepared.peak is not None
        assert reference is not None
        return prepared.values.mul_((prepared.peak - reference).exp_())

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, out: Tensor, *, keys: bool) -> Tensor:
        """Through waves and factors, and the products."""
        square = (grad * features).sum(dim=-1, keepdim=True) if keys else None
        (cosine, sine), (of_cosine, of_sine) = features.chunk(2, dim=-1), grad.chunk(2, dim=-1)
        return self._from_products(x, of_sine * cosine - of_cosine * sine, square, out)


@dataclass(frozen=True, eq=False)
class ReluRandom(Projected):
    """max(ω·x, 0) + ε, the generalised kernel of ReLU.

    Attributes:
        epsilon: ε.
    """

    epsilon: float

    def queries(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Products, rectified."""
        return self._products(x).relu_().add_(self.epsilon)

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, out: Tensor, *, keys: bool) -> Tensor:
        """Through what is above 0."""
        return self._from_products(x, grad.mul_(features > self.epsilon), None, out)


def _shift(prepared: Prepared, reference: Tensor | None) -> Tensor:
    """What is added to products: peaks and references, whose squares lose digits, only meet each other."""
    assert prepared.shift is not None
    assert prepared.peak is not None
    assert reference is not None
    return prepared.shift + (prepared.peak - reference)


def _both_signs(products: Tensor, shift: Tensor) -> Tensor:
    """exp(±products + shift), side by side."""
    return torch.cat((products + shift, shift - products), dim=-1).exp_()
