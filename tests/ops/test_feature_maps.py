"""Feature maps: φ = elu + 1 without cancellation, and stabilised random features."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from subquad.ops.features import elu_plus_one, key_features, positive_features, query_features


def test_elu_plus_one_is_elu_plus_one_with_its_gradient() -> None:
    x = torch.tensor([-30.0, -5.0, -1e-3, 0.0, 1e-3, 2.0], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(elu_plus_one(x), F.elu(x) + 1, rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad(elu_plus_one(x).sum(), x)
    (expected,) = torch.autograd.grad((F.elu(x) + 1).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_elu_plus_one_keeps_what_bfloat16_would_cancel() -> None:
    x = torch.tensor([-10.0, -20.0], dtype=torch.bfloat16)
    assert not (F.elu(x) + 1).any()
    assert bool((elu_plus_one(x) > 0).all())


def test_huge_inputs_have_finite_gradients() -> None:
    x = torch.tensor([-1e4, 1e4], requires_grad=True)
    elu_plus_one(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_stabilised_features_are_the_definition_up_to_one_factor(scale: float) -> None:
    x, directions = scale * torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    exact = positive_features(x, directions)
    per_query = query_features(x, directions, epsilon=0.0) / exact
    torch.testing.assert_close(per_query, per_query[..., :1].expand_as(per_query))
    per_sequence = key_features(x, directions, epsilon=0.0, valid=None) / exact
    torch.testing.assert_close(per_sequence, per_sequence[..., :1, :1].expand_as(per_sequence))


def test_features_never_overflow() -> None:
    x, directions = 1e4 * torch.randn(1, 1, 5, 4), torch.randn(6, 4)
    for mapped in (
        query_features(x, directions, epsilon=1e-6),
        key_features(x, directions, epsilon=1e-6, valid=None),
    ):
        assert bool(mapped.isfinite().all())
        assert float(mapped.max()) <= (1 + 1e-6) / 6**0.5 + 1e-6


def test_invalid_keys_set_no_maximum_and_have_no_features() -> None:
    x, directions = torch.randn(1, 2, 5, 4), torch.randn(6, 4)
    valid = torch.tensor([[True, True, False, True, False]])
    x[:, :, 2] = directions[directions.norm(dim=1).argmax()]  # the largest exponent that there can be
    mapped = key_features(x, directions, epsilon=1e-3, valid=valid)
    alone = key_features(x[:, :, valid[0]], directions, epsilon=1e-3, valid=None)
    torch.testing.assert_close(mapped[:, :, valid[0]], alone)
    assert not mapped[:, :, ~valid[0]].any()
    assert not key_features(x, directions, epsilon=1e-3, valid=valid & False).any()
