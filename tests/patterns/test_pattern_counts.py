"""Visible keys per query: closed forms of the papers, equality with the dense definition, and no L x L on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import plain_predicates as plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subquad.patterns import (
    Block,
    BlockWindow,
    Causal,
    Columns,
    Dilated,
    Global,
    Log,
    Ngram,
    Pattern,
    Random,
    Sink,
    Strided,
    Window,
    counting,
)

LONG = 2**16


def bigbird(length: int, block: int, random: int, seed: int = 0) -> Pattern:
    """First and last block global, a window of three blocks, random blocks."""
    ends = (*range(block), *range(length - block, length))
    fixed = BlockWindow(block, 1, 1) | Global(ends)
    return fixed | Random(block, random, seed, exclude=fixed)


def bigbird_count(length: int, block: int, random: int) -> Callable[[int], int]:
    last = length // block - 1

    def count(i: int) -> int:
        row = i // block
        if row in (0, last):
            return length
        return (4 + random if row in (1, last - 1) else 5 + random) * block

    return count


@pytest.mark.parametrize("length", [1, 7, 8, 41, 64])
@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        pytest.param(Causal() & Window(8, 0), lambda i: min(i, 8) + 1, id="strided local of the paper"),
        pytest.param(Causal() & Window(7, 0), lambda i: min(i + 1, 8), id="strided local of the code"),
        pytest.param(Causal() & Strided(8), lambda i: i // 8 + 1, id="strided summary"),
        pytest.param(Causal() & (Window(7, 0) | Strided(8)), lambda i: min(i + 1, 8) + i // 8, id="strided merged"),
        pytest.param(Causal() & Block(8), lambda i: i % 8 + 1, id="fixed local"),
        pytest.param(
            Causal() & Columns(8, 3), lambda i: 3 * (i // 8) + max(0, i % 8 - (8 - 3) + 1), id="fixed summary"
        ),
        pytest.param(Causal() & (Block(8) | Columns(8, 3)), lambda i: i % 8 + 1 + 3 * (i // 8), id="fixed merged"),
        pytest.param(Ngram(5), lambda i: min(i + 1, 4), id="n-gram"),
        pytest.param(Ngram(1), lambda i: 0, id="unigram"),
        pytest.param(Log(), lambda i: 1 + (int(math.log2(i)) + 1 if i else 0), id="log-sparse"),
        pytest.param(Causal() & (Window(9, 0) | Sink(4)), lambda i: min(i + 1, 4 + 9 + 1), id="sinks"),
        pytest.param(Causal(), lambda i: i + 1, id="causal"),
    ],
)
def test_counts_are_the_closed_forms_of_the_papers(pattern: Pattern, count: Callable[[int], int], length: int) -> None:
    expected = torch.tensor([count(i) for i in range(length)])
    assert torch.equal(pattern.keys_per_query(length), expected)
    assert torch.equal(pattern.dense(length).sum(dim=1), expected)


@pytest.mark.parametrize(("radius", "dilation"), [(4, 1), (4, 2), (3, 5)])
def test_a_dilated_window_has_as_many_keys_inside_as_a_plain_one(radius: int, dilation: int) -> None:
    inside = slice(radius * dilation, 64 - radius * dilation)
    assert Dilated(radius, radius, dilation).keys_per_query(64)[inside].unique().tolist() == [2 * radius + 1]


@pytest.mark.parametrize(("length", "block", "random"), [(64, 4, 3), (60, 5, 0), (96, 8, 2)])
def test_a_row_of_bigbird_has_five_blocks_and_its_random_ones(length: int, block: int, random: int) -> None:
    expected = torch.tensor([bigbird_count(length, block, random)(i) for i in range(length)])
    assert torch.equal(bigbird(length, block, random).dense(length).sum(dim=1), expected)
    assert torch.equal(bigbird(length, block, random).keys_per_query(length), expected)


@dataclass(frozen=True)
class Opaque(Pattern):
    """A pattern that no question but the one for pairs can be asked of."""

    part: Pattern

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """As the part."""
        return self.part.visible(i, j)


@settings(max_examples=60)
@given(st.integers(1, 19).flatmap(lambda length: st.tuples(plain.compositions(length), st.just(length))))
def test_counts_of_any_composition_equal_the_dense_ones(drawn: tuple[plain.Case, int]) -> None:
    (pattern, sees), length = drawn
    expected = plain.matrix(sees, length, length).sum(dim=1)
    assert torch.equal(pattern.keys_per_query(length), expected)
    assert pattern.density(length) == pytest.approx(expected.sum().item() / length**2, rel=1e-12)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 700])
@pytest.mark.parametrize(
    "pattern",
    [
        Window(300, 20) | Global((0,)),
        Causal() & (Block(100) | Columns(100, 30, 8)),
        Causal() & (Window(40, 0) | Strided(31) | Sink(2)),
        Block(600) | Block(30),
        Block(3) & ~Strided(2),
        Opaque(Window(3, 1)) | Dilated(4, 4, 9),
        ~Block(50) & Causal(),
        Sink(400) & ~Causal(),
    ],
    ids=str,
)
def test_counts_equal_the_dense_ones_across_tiles(pattern: Pattern, length: int) -> None:
    assert torch.equal(pattern.keys_per_query(length), pattern.dense(length).sum(dim=1))


def test_heads_are_counted_apart_and_density_is_their_mean() -> None:
    pattern = Causal().heads({1: Window(0, 0), 2: Window(0, 0)})
    counts = pattern.keys_per_query(8)
    assert torch.equal(counts, pattern.dense(8).sum(dim=2))
    assert counts.shape == (3, 8)
    assert pattern.density(8) == pytest.approx((36 + 8 + 8) / 3 / 64)


def test_no_tokens_have_no_keys() -> None:
    assert Causal().keys_per_query(0).shape == (0,)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        pytest.param(Window(255, 256), lambda i: min(i, 255) + 1 + min(LONG - 1 - i, 256), id="window"),
        pytest.param(
            Causal() & (Window(127, 0) | Strided(128)), lambda i: min(i + 1, 128) + i // 128, id="strided merged"
        ),
        pytest.param(
            Causal() & (Window(127, 0) | Strided(128) | Sink(1)),
            lambda i: min(i + 1, 128) + i // 128 + (i > 127 and i % 128 > 0),
            id="strided merged with a sink",
        ),
        pytest.param(bigbird(LONG, 64, 3), bigbird_count(LONG, 64, 3), id="bigbird"),
    ],
)
def test_counts_at_65536_tokens_are_exact_and_look_at_few_pairs_at_a_time(
    pattern: Pattern, count: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 0
    for kind in (Window, Causal, Strided, Sink, Global, BlockWindow, Random):
        original = kind.visible

        def watched(self: Pattern, i: Tensor, j: Tensor, original: Callable[..., Tensor] = original) -> Tensor:
            nonlocal largest
            visible = original(self, i, j)
            largest = max(largest, visible.numel())
            return visible

        monkeypatch.setattr(kind, "visible", watched)
    expected = torch.tensor([int(count(i)) for i in range(LONG)])
    assert torch.equal(pattern.keys_per_query(LONG), expected)
    assert pattern.density(LONG) == pytest.approx(expected.sum().item() / LONG**2, rel=1e-12)
    assert largest <= counting.CHUNK_PAIRS
