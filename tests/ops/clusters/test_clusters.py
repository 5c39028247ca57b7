"""K-means: nearest centroids, members, and the moving averages; attention inside clusters against the definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import layer_norm

from subquad.ops.clusters import causal_window as cluster_window
from subquad.ops.clusters import kmeans as clusters
from subquad.ops.clusters import member_attention
from subquad.ops.clusters.causal_window import cluster_window_attention, window_attention_by_pairs
from subquad.ops.clusters.kmeans import Centroids, commitment, members, moved, nearest, standardise
from subquad.ops.softmax import softmax_attention_with_lse

LENGTHS = st.sampled_from([1, 2, 5, 63, 64, 65, 130])


def qkv(length: int) -> list[Tensor]:
    return [torch.randn(2, 3, length, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def counts(length: int, padded: bool) -> list[int]:
    return [max(0, length - 3), length] if padded else [length, length]


def assert_same(one: Tensor, other: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(one)
    both = [torch.autograd.grad((out * weights).sum(), leaves) for out in (one, other)]
    for gradient, expected in zip(*both, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("call_bytes", [4 * 2**20, 1])
@given(length=LENGTHS, clusters=st.integers(1, 4), window=st.sampled_from([1, 4, 70]), padded=st.booleans())
def test_attention_between_members_equals_the_definition(
    call_bytes: int, length: int, clusters: int, window: int, padded: bool
) -> None:
    q, k, v = qkv(length)
    means = torch.randn(3, clusters, 4, dtype=torch.float64)
    chosen = [
        [members(x[b, :, :n], means, min(window, n))[0] for b, n in enumerate(counts(length, padded))] for x in (q, k)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member_attention, "CALL_BYTES", call_bytes)
        found = member_attention.member_attention(q, k, v, *chosen, scale=0.7, epsilon=0.01)
        expected = member_attention.member_attention_by_clusters(q, k, v, *chosen, scale=0.7, epsilon=0.01)
        assert_same(found, expected, [q, k, v])


@pytest.mark.parametrize("call_bytes", [4 * 2**20, 1])
@given(length=LENGTHS, clusters=st.integers(1, 4), window=st.sampled_from([1, 4, 70]), padded=st.booleans())
def test_attention_in_a_window_equals_the_definition(
    call_bytes: int, length: int, clusters: int, window: int, padded: bool
) -> None:
    q, k, v = qkv(length)
    labels = torch.randint(0, clusters, (2, 3, length))
    valid = torch.arange(length) < torch.tensor(counts(length, padded))[:, None] if padded else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_window, "CALL_BYTES", call_bytes)
        found = cluster_window_attention(q, k, v, labels, window, scale=0.7, valid=valid)
        expected = window_attention_by_pairs(q, k, v, labels, window, scale=0.7, valid=valid)
        assert_same(found, expected, [q, k, v])


def test_the_window_of_a_cluster_holds_its_last_tokens() -> None:
    labels, expected = [0, 1, 0, 0, 1, 0], [[0], [1], [0, 2], [2, 3], [1, 4], [3, 5]]
    q = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    values = torch.eye(6, dtype=torch.float64)[None, None]
    found = cluster_window_attention(q, q, values, torch.tensor(labels)[None, None], 2, scale=1.0)
    assert [row.nonzero().flatten().tolist() for row in found[0, 0]] == expected


def test_a_token_in_two_clusters_gets_the_mean_and_one_in_none_0() -> None:
    q, k, v = qkv(5)
    chosen = [torch.tensor([[[0, 1], [1, 2]]]).expand(3, -1, -1)] * 2
    found = member_attention.member_attention(q, k, v, chosen, chosen, scale=1.0, epsilon=0.25)
    everything = torch.ones(2, 2, dtype=torch.bool)
    first, second = (
        softmax_attention_with_lse(q[:, :, s], k[:, :, s], v[:, :, s], everything, 1.0)[0]
        for s in (slice(0, 2), slice(1, 3))
    )
    torch.testing.assert_close(found[:, :, 0], first[:, :, 0] / 1.25, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[:, :, 1], (first[:, :, 1] + second[:, :, 0]) / 2.25, rtol=1e-10, atol=1e-10)
    assert not found[:, :, 3:].any()


def test_standardising_is_layer_norm_without_parameters() -> None:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    assert_same(standardise(x), layer_norm(x, (6,), eps=clusters.NORM_EPSILON), [x])


@given(length=LENGTHS, count=st.integers(1, 9), elements=st.sampled_from([1, 100, 2**20]))
def test_members_and_nearest_are_those_of_all_products(length: int, count: int, elements: int) -> None:
    x = torch.randn(2, 3, length, 4, dtype=torch.float64)
    means, size = torch.randn(3, count, 4, dtype=torch.float64), min(3, length)
    products = x @ means.mT
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "SLICE_ELEMENTS", elements)
        assert torch.equal(nearest(x, means), products.argmax(dim=-1))
        found, labels = members(x[0], means, size)
    assert torch.equal(found, products[0].mT.topk(size).indices.sort().values)
    assert torch.equal(labels, products[0].argmax(dim=-1))


def test_averages_move_by_the_formula() -> None:
    means = torch.tensor([[[1.0, 0], [0, 1], [5, 5]]], dtype=torch.float64)
    before = Centroids(means, torch.tensor([[2.0, 1, 1]], dtype=torch.float64), 2 * means)
    queries = torch.tensor([[[[3.0, 1], [9, 9]]]], dtype=torch.float64)  # of which the last doesn't count
    keys = torch.tensor([[[[2.0, 1], [0, 4]]]], dtype=torch.float64)
    labels = [[torch.tensor([[0, 2]])], [torch.tensor([[0, 1]])]]
    after = moved(before, [queries[:, :, :1], keys[:, :, :1]], labels, [1], 0.75)
    expected = torch.tensor([2.0 * 0.75 + 0.25 * 2, 0.75, 0.75], dtype=torch.float64)
    torch.testing.assert_close(after.counts[0], expected)
    torch.testing.assert_close(after.sums[0, 0], torch.tensor([1.5 + 0.25 * 5, 0.25 * 2], dtype=torch.float64))
    total, epsilon = expected.sum(), 1e-5
    smooth = (expected + epsilon) / (total + 3 * epsilon) * total
    torch.testing.assert_close(after.means[0], after.sums[0] / smooth[:, None], rtol=1e-12, atol=1e-12)


def test_centroids_without_vectors_stay_where_nothing_earlier_counts() -> None:
    means = torch.tensor([[[1.0, 0], [0, 1], [5, 5]]], dtype=torch.float64)
    before = Centroids(means, torch.ones(1, 3, dtype=torch.float64), means)
    x = torch.tensor([[[[3.0, 1], [9, 9]]]], dtype=torch.float64)  # of which the last doesn't count
    after = moved(before, [x], [[torch.tensor([[0, 2]])]], [1], 0.0)
    assert after.counts.tolist() == [[1, 0, 0]]
    torch.testing.assert_close(after.means[0, 0], x[0, 0, 0], rtol=1e-4, atol=0)
    assert torch.equal(after.means[0, 1:], means[0, 1:])


def test_repeated_updates_are_k_means() -> None:
    """Three clouds: every centroid ends in the mean of its cloud."""
    centres = torch.eye(3, dtype=torch.float64) * 4
    x = (centres.repeat_interleave(50, dim=0) + 0.1 * torch.randn(150, 3, dtype=torch.float64))[None, None]
    means = torch.eye(3, dtype=torch.float64)[None] + 0.3
    centroids = Centroids(means, torch.ones(1, 3, dtype=torch.float64), means)
    for _ in range(60):
        labels = [list(nearest(x, centroids.means))]
        centroids = moved(centroids, [x], labels, [150], 0.7)
    torch.testing.assert_close(centroids.means[0], x[0, 0].unflatten(0, (3, 50)).mean(dim=1), rtol=0, atol=1e-5)


@given(padded=st.booleans())
def test_the_commitment_is_the_mean_squared_distance_and_holds_the_centroids_fixed(padded: bool) -> None:
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64, requires_grad=True)
    means, lengths = torch.randn(3, 5, 4, dtype=torch.float64), counts(6, padded)
    labels = nearest(x, means)
    found = commitment(x, means, list(labels), lengths)
    parts = [x[b, h, :n] - means[h, labels[b, h, :n]] for b, n in enumerate(lengths) for h in range(3)]
    expected = torch.cat(parts).square().mean()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    one, other = (torch.autograd.grad(loss, x)[0] for loss in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)
