"""Sorting matrices: doubly stochastic, permutations in the limit, and causal ones that know nothing of later blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subquad.ops.sorted_blocks.sorting import (
    BlockScores,
    Sorting,
    block_descriptors,
    later_rows,
    sinkhorn,
    sorting_matrices,
)


def by_division(scores: Tensor, iterations: int, *, causal: bool) -> Tensor:
    """The definition without logarithms, entry by entry."""
    count = len(scores)
    allowed = [[v < u if causal else True for v in range(count)] for u in range(count)]
    matrix = [[float(scores[u, v].exp()) if allowed[u][v] else 0.0 for v in range(count)] for u in range(count)]
    for _ in range(iterations):
        matrix = [[entry / sum(row) if entry else 0.0 for entry in row] for row in matrix]
        last = [u if causal else count - 1 for u in range(count)]
        sums = [[sum(matrix[w][v] for w in range(last[u] + 1)) for v in range(count)] for u in range(count)]
        matrix = [[matrix[u][v] / sums[u][v] if matrix[u][v] else 0.0 for v in range(count)] for u in range(count)]
    return torch.tensor(matrix, dtype=torch.float64)


@given(count=st.integers(1, 6), iterations=st.integers(0, 6), causal=st.booleans())
def test_it_equals_repeated_division_by_sums(count: int, iterations: int, causal: bool) -> None:
    scores = torch.randn(count, count, dtype=torch.float64)
    expected = by_division(scores, iterations, causal=causal)
    torch.testing.assert_close(sinkhorn(scores, iterations, causal=causal), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_after_enough_iterations_the_matrix_is_doubly_stochastic(count: int) -> None:
    matrix = sinkhorn(torch.randn(2, 3, count, count, dtype=torch.float64), 400)
    ones = torch.ones(2, 3, count, dtype=torch.float64)
    torch.testing.assert_close(matrix.sum(dim=-1), ones, rtol=0, atol=1e-9)
    torch.testing.assert_close(matrix.sum(dim=-2), ones, rtol=0, atol=1e-9)


def test_after_few_iterations_it_is_not() -> None:
    matrix = sinkhorn(3 * torch.randn(7, 7, dtype=torch.float64), 1)
    assert float((matrix.sum(dim=-1) - 1).abs().max()) > 1e-3


def test_towards_temperature_0_the_best_permutation_is_left() -> None:
    order = torch.tensor([2, 0, 3, 1])
    permutation = torch.eye(4, dtype=torch.float64)[order]
    noisy = permutation + 0.2 * torch.rand(4, 4, dtype=torch.float64)
    blocks = BlockScores(torch.eye(4, dtype=torch.float64)[None], noisy.T[None], noisy.new_zeros(1, 4))
    (matrix,) = sorting_matrices(blocks, Sorting(20, 1e-3, causal=False), [4])
    torch.testing.assert_close(matrix[0], permutation, rtol=0, atol=1e-12)


@given(count=st.integers(1, 7), data=st.data())
def test_a_causal_row_is_not_changed_by_later_rows(count: int, data: st.DataObject) -> None:
    scores, cut = torch.randn(count, count, dtype=torch.float64), data.draw(st.integers(1, count))
    whole = sinkhorn(scores, 5, causal=True)
    torch.testing.assert_close(sinkhorn(scores[:cut, :cut], 5, causal=True), whole[:cut, :cut], rtol=0, atol=0)
    assert not whole.triu().any()


@given(sizes=st.lists(st.integers(0, 3), min_size=1, max_size=4), iterations=st.integers(0, 4), data=st.data())
def test_later_rows_follow_from_the_sums_of_columns(sizes: list[int], iterations: int, data: st.DataObject) -> None:
    """Of two examples the second has fewer new rows in each part."""
    count = sum(sizes)
    scores = torch.randn(2, 3, count + 1, count + 1, dtype=torch.float64)
    sums, opened = torch.zeros(2, 3, iterations, 0, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    found: list[list[Tensor]] = [[], []]
    for size in sizes:
        added = torch.tensor([size, data.draw(st.integers(0, size))])
        numbers = opened[:, None] + torch.arange(size)
        part = torch.stack([scores[b][:, numbers[b]] for b in range(2)])
        opened = opened + added
        rows, sums = later_rows(part, numbers, opened, sums)
        for b in range(2):
            found[b].append(rows[b, :, : added[b]])
            assert not rows[b, :, added[b] :].any()
    for b, length in enumerate(opened.tolist()):
        whole = sinkhorn(scores[b, :, :length, :length], iterations, causal=True)
        rows = torch.cat(found[b], dim=1)
        torch.testing.assert_close(rows[..., :length], whole, rtol=1e-12, atol=1e-12)
        assert not rows[..., length:].any()


def test_columns_normalised_over_all_rows_would_tell_of_later_blocks() -> None:
    """What the paper publishes; the test above would see it."""
    scores, hidden = torch.randn(5, 5, dtype=torch.float64), torch.ones(5, 5, dtype=torch.bool).triu()

    def published(part: Tensor) -> Tensor:
        part = part.masked_fill(hidden[: len(part), : len(part)], -1e30)
        part = part - part.logsumexp(dim=1, keepdim=True)
        return (part - part.logsumexp(dim=0)).exp()

    assert float((published(scores[:4, :4])[3, :3] - published(scores)[3, :3]).abs().max()) > 1e-2


def test_gradients_pass_through_every_iteration() -> None:
    for causal in (False, True):
        scores = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda s, causal=causal: sinkhorn(s, 4, causal=causal), scores)


def test_noise_is_that_of_its_seed_and_is_gumbel() -> None:
    blocks = BlockScores(torch.zeros(1, 300, 1), torch.zeros(2, 300, 1), torch.zeros(2, 300))
    one, same, other = (sorting_matrices(blocks, Sorting(0, 1.0, False, seed), [300])[0] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    noise = one.log()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.std()) == pytest.approx(1.2825, abs=0.02)


def test_only_the_first_blocks_of_an_example_are_sorted() -> None:
    blocks = BlockScores(*(torch.randn(shape, dtype=torch.float64) for shape in ((2, 5, 3), (2, 6, 3), (2, 6))))
    sorting = Sorting(3, 0.5, causal=False)
    short, _ = sorting_matrices(blocks, sorting, [3, 5])
    (alone,) = sorting_matrices(blocks._replace(hidden=blocks.hidden[:1, :3]), sorting, [3])
    torch.testing.assert_close(short, alone, rtol=1e-12, atol=1e-12)


def test_blocks_are_described_by_sums() -> None:
    x = torch.arange(1.0, 8.0)[None, :, None]
    assert block_descriptors(x, 3, causal=False).flatten().tolist() == [6, 15, 7]
    assert block_descriptors(x, 3, causal=True).flatten().tolist() == [1, 10, 28]
    many = torch.ones(1, 1024, 1, dtype=torch.bfloat16)
    assert block_descriptors(many, 1024, causal=False).tolist() == [[[1024.0]]]
    assert block_descriptors(many, 512, causal=True).flatten().tolist() == [1.0, 512.0]
