"""Random blocks: uniform over what is legal, the same everywhere, and drawn without anybody's generator."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subquad.patterns import Block, BlockWindow, Causal, Global, Random, Sink, Strided, Window, blocks

BLOCKS = 10
SEEDS = 2000


def drawn(pattern: Random, blocks: int) -> np.ndarray:
    """Which key blocks each query block got: bool (blocks, blocks)."""
    dense = pattern.dense(blocks * pattern.size)
    return dense[:: pattern.size, :: pattern.size].numpy()


def chi_square(counts: np.ndarray) -> float:
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


def test_every_legal_block_is_equally_likely_in_every_row() -> None:
    exclude = BlockWindow(2, 1, 1) | Sink(2)
    tables = np.stack([drawn(Random(2, 2, seed, exclude), BLOCKS) for seed in range(SEEDS)])
    legal = ~exclude.dense(2 * BLOCKS)[::2, ::2].numpy()
    assert not tables[:, ~legal].any()
    for row in range(BLOCKS):
        counts = tables[:, row, legal[row]].sum(axis=0)
        assert counts.sum() == 2 * SEEDS
        assert chi_square(counts) < 22  # 8 classes at most: exceeded once in 400 rows if all are equally likely


def test_every_set_of_blocks_is_equally_likely() -> None:
    tables = np.stack([drawn(Random(1, 2, seed), 6) for seed in range(SEEDS)])
    subsets = [list(subset) for subset in itertools.combinations(range(6), 2)]
    counts = np.zeros((6, len(subsets)))
    for table in tables:
        for row in range(6):
            counts[row, subsets.index(np.flatnonzero(table[row]).tolist())] += 1
    for row in counts:
        assert chi_square(row) < 37  # 15 subsets: exceeded once in 1000 rows


def test_rows_are_drawn_independently() -> None:
    tables = np.stack([drawn(Random(1, 1, seed), 5) for seed in range(SEEDS)])
    first, second = tables[:, 0].argmax(axis=1), tables[:, 1].argmax(axis=1)
    assert chi_square(np.bincount(5 * first + second, minlength=25)) < 51  # 25 pairs: exceeded once in 1000


@given(st.integers(1, 5), st.integers(0, 9), st.integers(1, 30), st.integers(0, 3))
def test_as_many_blocks_as_asked_are_drawn_and_all_legal_ones_where_there_are_fewer(
    size: int, count: int, length: int, seed: int
) -> None:
    exclude = Block(size) | Window(2, 0)
    pattern = Random(size, count, seed, exclude)
    starts = range(0, length, size)
    dense, excluded = pattern.dense(length), exclude.dense(length)
    for i in starts:
        legal = [j for j in starts if not excluded[i : i + size, j : j + size].all()]
        got = [j for j in starts if dense[i, j]]
        assert set(got) <= set(legal)
        assert len(got) == min(count, len(legal))
    whole = dense[list(starts)][:, list(starts)].repeat_interleave(size, 0).repeat_interleave(size, 1)
    assert torch.equal(dense, whole[:length, :length])


def test_a_block_that_is_excluded_in_part_is_legal() -> None:
    table = drawn(Random(4, BLOCKS, 0, Causal()), BLOCKS)
    assert np.array_equal(table, ~np.tri(BLOCKS, k=-1, dtype=bool))


def test_no_generator_is_used_or_moved() -> None:
    np.random.seed(1)
    torch.manual_seed(1)
    random.seed(1)
    before = drawn(Random(2, 3, 5), 16)
    untouched = (np.random.rand(), torch.rand(()).item(), random.random())
    np.random.seed(1)
    torch.manual_seed(1)
    random.seed(1)
    assert untouched == (np.random.rand(), torch.rand(()).item(), random.random())
    assert np.array_equal(before, drawn(Random(2, 3, 5), 16))


SCRIPT = """
from subquad.patterns import BlockWindow, Random
print(Random(2, 2, 7, exclude=BlockWindow(2, 1, 1)).dense(16)[::2, ::2].int().tolist())
"""


def test_the_draw_is_the_same_in_every_process_and_version() -> None:
    table = drawn(Random(2, 2, 7, exclude=BlockWindow(2, 1, 1)), 8)
    printed = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(table.astype(int).tolist())
    columns = [np.flatnonzero(row).tolist() for row in table]
    assert columns == [[3, 6], [3, 4], [5, 7], [0, 7], [0, 7], [0, 2], [2, 4], [1, 3]]


def test_seeds_and_heads_differ() -> None:
    tables = {drawn(Random(2, 2, seed), 16).tobytes() for seed in range(50)}
    assert len(tables) == 50


def test_a_table_is_the_same_drawn_in_one_piece_or_several(monkeypatch: pytest.MonkeyPatch) -> None:
    exclude = BlockWindow(4, 1, 1) | Global(2) | Strided(3)
    whole = drawn(Random(4, 3, 11, exclude), 32)
    blocks._wholly_visible.cache_clear()
    monkeypatch.setattr(blocks, "CHUNK_PAIRS", 50)
    assert np.array_equal(whole, drawn(Random(4, 3, 11, exclude), 32))
