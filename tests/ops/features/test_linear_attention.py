"""Linear attention from running sums equals its definition by pairs, for every chunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import subquad
from subquad.benchmark.memory import saved_bytes
from subquad.ops import onednn
from subquad.ops.features import slices, sums
from subquad.ops.features.attention import linear_attention, linear_attention_by_pairs
from subquad.ops.features.causal import Settings, causal_sums, segments
from subquad.ops.features.maps import FeatureMap, HyperbolicRandom, PositiveRandom, Ready, ReluRandom
from subquad.ops.features.random_features import positive_features
from subquad.ops.features.slices import SLICE_TOKENS
from subquad.ops.features.sums import Sums, read_sums, sum_keys


def features(length: int, *, key_length: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    key_length = length if key_length is None else key_length
    q = torch.rand(2, 3, length, 4, dtype=torch.float64, requires_grad=True)
    k = torch.rand(2, 3, key_length, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 3, key_length, 5, dtype=torch.float64, requires_grad=True)
    return q, k, v


@given(
    length=st.sampled_from([1, 2, 63, 64, 65, 130]),
    causal=st.booleans(),
    normalize=st.booleans(),
    share=st.sampled_from([None, 0.0, 0.5]),
)
def test_sums_equal_the_definition(length: int, causal: bool, normalize: bool, share: float | None) -> None:
    q, k, v = features(length, key_length=length if causal else 7)
    valid = None if share is None else torch.rand(2, k.shape[2]) < share
    out = linear_attention(q, k, v, causal=causal, normalize=normalize, valid=valid)
    expected = linear_attention_by_pairs(q, k, v, causal=causal, normalize=normalize, valid=valid)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(out)
    pairs = (torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (out, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


DIRECTIONS = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
FEATURE_MAPS: list[FeatureMap] = [Ready(), PositiveRandom(DIRECTIONS, 1.0)]


@pytest.mark.parametrize("feature_map", FEATURE_MAPS, ids=["ready", "positive"])
@given(length=st.integers(1, 20), cut=st.integers(0, 20), chunk=st.integers(1, 25), padded=st.booleans())
def test_sums_go_on_from_earlier_tokens_with_their_gradients(
    feature_map: FeatureMap, length: int, cut: int, chunk: int, padded: bool
) -> None:
    inputs, settings = features(length), Settings(feature_map, 1e-6, chunk)
    valid = torch.rand(2, length) < 0.7 if padded else torch.ones(2, length, dtype=torch.bool)
    cut = min(cut, length - 1)
    whole, after = causal_sums(*inputs, None, settings, valid)
    before, pieces = None, []
    for part in (slice(0, cut), slice(cut, length)):
        if part.stop > part.start:
            q, k, v = (tensor[:, :, part] for tensor in inputs)
            out, before = causal_sums(q, k, v, before, settings, valid[:, part])
            pieces.append(out)
    assert isinstance(before, Sums)
    results = [(whole, *after[:2]), (torch.cat(pieces, dim=2), *before[:2])]
    weights = [torch.randn_like(tensor) for tensor in results[0]]
    losses = [torch.stack([(y * w).sum() for y, w in zip(result, weights, strict=True)]).sum() for result in results]
    one, other = ((*result, *torch.autograd.grad(loss, inputs)) for result, loss in zip(results, losses, strict=True))
    for tensor, expected in zip(one, other, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-10, atol=1e-10)


@given(length=st.sampled_from([1, 5, 64, 200]), causal=st.booleans(), scale=st.sampled_from([0.5, 3.0]))
def test_sums_of_exponentials_equal_the_definition(length: int, causal: bool, scale: float) -> None:
    q, k, v = (scale * torch.randn(2, 3, length, 4, dtype=torch.float64) for _ in range(3))
    q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
    feature_map = PositiveRandom(DIRECTIONS, 1.0)
    if causal:
        out = causal_sums(q, k, v, None, Settings(feature_map, 0.0, 16))[0]
    else:
        out = read_sums(q, sum_keys(k, v, feature_map), feature_map, epsilon=0.0)
    mapped_q, mapped_k = (positive_features(x, DIRECTIONS) for x in (q, k))
    sums, weights = (
        linear_attention_by_pairs(mapped_q, mapped_k, x, causal=causal, normalize=False)
        for x in (v, torch.ones_like(v))
    )
    expected = sums / weights
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)
    weights = torch.randn_like(out)
    pairs = (torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (out, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_heads_in_slices_of_tokens_equal_the_definition(
    monkeypatch: pytest.MonkeyPatch, causal: bool, padded: bool
) -> None:
    """Head by head, longer than a slice and than a segment, and with the strides of split heads."""
    monkeypatch.setattr(slices, "SLICE_NUMBERS", 1)
    valid = torch.rand(2, 2500) < 0.7 if padded else None
    q, k, v = (torch.rand(2, 2500, 3, 4, dtype=torch.float64).transpose(1, 2).requires_grad_() for _ in range(3))
    out = linear_attention(q, k, v, causal=causal, valid=valid)
    expected = linear_attention_by_pairs(q, k, v, causal=causal, valid=valid)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert out.stride() == q.stride()
    weights = torch.randn_like(out)
    pairs = (torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (out, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@given(length=st.integers(1, 300), chunk=st.integers(1, 9))
def test_segments_cover_every_token_once_in_whole_chunks(length: int, chunk: int) -> None:
    covered = []
    for tokens, chunks in segments(length, chunk):
        covered += range(tokens.start, tokens.stop)
        assert (tokens.stop - tokens.start) == chunks * chunk or (chunks == 1 and tokens.stop == length)
    assert covered == list(range(length))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1024, 4096])
def test_little_more_is_kept_than_queries_keys_values_and_result(causal: bool, length: int) -> None:
    q, k, v = (torch.rand(1, 4, length, 64).requires_grad_() for _ in range(3))
    kept = saved_bytes(lambda: linear_attention(q, k, v, causal=causal), [])
    assert kept <= 1.1 * 4 * q.nbytes


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("make", [PositiveRandom, HyperbolicRandom, partial(ReluRandom, epsilon=1e-3)])
def test_of_random_features_not_much_more_is_kept_either(make: Callable[..., FeatureMap], causal: bool) -> None:
    """All features of queries and keys alone would be two to four times the four tensors."""
    directions, length = torch.randn(256, 64), 2048
    feature_map = make(directions, 64**-0.5)
    q, k, v = (torch.rand(1, 4, length, 64).requires_grad_() for _ in range(3))

    def attend() -> Tensor:
        if causal:
            return causal_sums(q, k, v, None, Settings(feature_map, 0.0, 64))[0]
        return read_sums(q, sum_keys(k, v, feature_map), feature_map, epsilon=0.0)

    assert saved_bytes(attend, [directions]) <= 1.5 * 4 * q.nbytes


@pytest.mark.parametrize("causal", [False, True])
def test_padding_may_hold_anything(causal: bool) -> None:
    q, k, v = (torch.rand(2, 3, 9, 4, dtype=torch.float64) for _ in range(3))
    valid = torch.rand(2, 9) < 0.6
    expected = linear_attention(q, k, v, causal=causal, valid=valid)
    k[~valid[:, None, :].expand(2, 3, 9)] = v[~valid[:, None, :].expand(2, 3, 9)] = float("nan")
    k, v = k.requires_grad_(), v.requires_grad_()
    out = linear_attention(q, k, v, causal=causal, valid=valid)
    assert torch.equal(out, expected)
    for gradient in torch.autograd.grad(out.sum(), (k, v)):
        assert not gradient[~valid[:, None, :].expand(2, 3, 9)].any()


def test_a_row_without_keys_gives_zero() -> None:
    q, k, v = features(4)
    out = linear_attention(q, k, v, causal=False, valid=torch.zeros(2, 4, dtype=torch.bool))
    assert not out.any()


@pytest.mark.parametrize("causal", [False, True])
def test_narrow_inputs_are_summed_in_float32(causal: bool) -> None:
    ones = torch.ones(1, 1, 3000, 2, dtype=torch.bfloat16)
    out = linear_attention(ones, ones, ones, causal=causal, normalize=False)
    assert out.dtype == torch.bfloat16
    assert float(out[0, 0, -1, 0]) == pytest.approx(6000, rel=0.01)


def test_it_is_public() -> None:
    assert subquad.ops.linear_attention is linear_attention


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 3, 4), (2, 3, 4, 4), (2, 3, 4, 4)), {}, r"must be \(B, H, L, E\), got 3, 4, 4 dimensions"),
        (((2, 3, 4, 4), (2, 3, 4, 5), (2, 3, 4, 4)), {}, r"expected q \(B, H, L, F\), .* got \(2, 3, 4, 4\)"),
        (((2, 3, 4, 4), (2, 3, 5, 4), (2, 3, 4, 4)), {}, r"expected q \(B, H, L, F\)"),
        (((2, 3, 4, 4), (2, 3, 5, 4), (2, 3, 5, 4)), {"causal": True}, "causal=True needs as many keys as queries"),
        (((2, 3, 4, 4),) * 3, {"valid": torch.ones(2, 4)}, r"valid must be bool \(2, 4\), got torch.float32"),
        (
            ((2, 3, 4, 4),) * 3,
            {"valid": torch.ones(2, 5, dtype=torch.bool)},
            r"valid must be bool \(2, 4\), .* \(2, 5\)",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shapes: tuple[tuple[int, ...], ...], options: dict[str, object], message: str
) -> None:
    q, k, v = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        linear_attention(q, k, v, **{"causal": False, **options})  # pyright: ignore[reportArgumentType] - cases


@pytest.mark.parametrize("causal", [False, True])
def test_autocast_does_not_narrow_the_sums(causal: bool) -> None:
    q, k, v = (torch.rand(1, 2, 300, 4) for _ in range(3))
    expected = linear_attention(q, k, v, causal=causal)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_attention(q, k, v, causal=causal), expected)


@pytest.mark.parametrize("outruns", [False, True], ids=["bmm", "oneDNN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_sums_of_wide_features_equal_the_definition(
    monkeypatch: pytest.MonkeyPatch, outruns: bool, dtype: torch.dtype
) -> None:
    """Several slices, each large enough for oneDNN, or for a share of its tokens on every thread."""
    for module in (onednn, sums):
        monkeypatch.setattr(module, "outruns_mm", lambda: outruns)
    length = SLICE_TOKENS + 100
    q, k = (torch.rand(1, 1, length, 64, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 1, length, 64, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(v)
    expected = linear_attention_by_pairs(q, k, v, causal=False)
    gradients = torch.autograd.grad(expected, (q, k, v), upstream)
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (q, k, v)]
    found = linear_attention(inputs[0], inputs[1], inputs[2], causal=False)
    results = (found, *torch.autograd.grad(found, inputs, upstream.to(dtype)))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for one, other in zip(results, (expected, *gradients), strict=True):
        largest = float(other.detach().abs().max())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * largest)
