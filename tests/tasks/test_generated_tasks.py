"""Tasks drawn from a seed: the same everywhere, and the examples are what the tasks' definitions say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad.labels import IGNORED
from subquad.tasks.base import DataPreset, TaskData
from subquad.tasks.mqar import draw_gaps
from subquad.tasks.random_words import RandomWords
from subquad.tasks.registry import load_task
from subquad.tasks.splits import LanguageSplit

SEQUENCES = {"symbols": 5, "shortest": 2, "longest": 6}
OPTIONS: dict[str, dict[str, Any]] = {
    "copy": SEQUENCES,
    "reverse": SEQUENCES,
    "duplicate": {"symbols": 9},
    "mqar": {"vocabulary": 20, "pairs": 3},
}
HASHES = {"copy": "90a88c7e9719", "reverse": "90d71ed7323a", "duplicate": "a7e3a5ee1fbb", "mqar": "af79e889c811"}


def preset(task: str, *, max_length: int = 16, **options: Any) -> DataPreset:
    return DataPreset("toy", task, False, 40, 10, 12, max_length, OPTIONS[task] | options)


def draw(task: str, *, seed: int = 0, **options: Any) -> TaskData[Any]:
    return load_task(task).prepare(Path("unused"), preset(task, **options), seed=seed)


@pytest.mark.parametrize("task", OPTIONS)
def test_a_seed_gives_the_same_examples_on_every_machine(task: str) -> None:
    assert draw(task).data_hash == HASHES[task]
    assert draw(task, seed=1).data_hash != HASHES[task]
    assert not Path("unused").exists()


@pytest.mark.parametrize("task", OPTIONS)
def test_splits_have_the_sizes_of_the_preset_and_share_no_stream(task: str) -> None:
    data = draw(task)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [40, 10, 12]
    first = {name: split.inputs[0].tolist() for name, split in data.splits.items()}
    assert first["train"] != first["validation"] != first["test"] != first["train"]
    assert all(
        split.inputs.values.min() >= 0 and split.inputs.values.max() < data.vocab_size for split in data.splits.values()
    )


@given(symbols=st.integers(2, 300), shortest=st.integers(1, 5), more=st.integers(0, 6))
def test_the_target_is_the_source_or_its_reverse(symbols: int, shortest: int, more: int) -> None:
    options = {"symbols": symbols, "shortest": shortest, "longest": shortest + more}
    for task, step in (("copy", 1), ("reverse", -1)):
        split = draw(task, **options).train
        assert [target.tolist() for target in split.targets] == [source.tolist()[::step] for source in split.inputs]
        assert shortest <= split.lengths.min() <= split.lengths.max() <= shortest + more


@given(symbols=st.integers(2, 300), half=st.integers(2, 9))
def test_a_word_is_said_again_and_its_second_half_alone_is_asked(symbols: int, half: int) -> None:
    split = draw("duplicate", max_length=2 * half, symbols=symbols).test
    for tokens, labels in rows(split):
        assert tokens[:half] == tokens[half:]
        assert tokens[0] == 0 < min(tokens[1:half]) <= max(tokens) <= symbols
        assert labels == [IGNORED] * (half + 1) + tokens[half + 1 :]


@given(pairs=st.integers(1, 5), room=st.integers(0, 9), filler=st.booleans())
def test_each_key_is_asked_once_and_its_value_is_the_label_behind_it(pairs: int, room: int, filler: bool) -> None:
    length = 4 * pairs + room
    split = draw("mqar", max_length=length, pairs=pairs, random_filler=filler).train
    for tokens, labels in rows(split):
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len({*keys, *values}) == 2 * pairs
        assert max(keys) < 10 <= min(values)
        asked = [place for place, label in enumerate(labels) if label != IGNORED]
        answers = {tokens[place - 1]: labels[place] for place in asked}
        assert answers == dict(zip(keys, values, strict=True))
        assert min(asked) > 2 * pairs
        if not filler:
            assert sum(token != 0 for token in tokens) == 3 * pairs


def test_short_gaps_are_as_frequent_as_their_power_law_says() -> None:
    gaps = draw_gaps(RandomWords(0, 0), rows=20_000, largest=8, count=1, power=0.5)[:, 0]
    weights = np.arange(1, 9) ** -0.5
    np.testing.assert_allclose(np.bincount(gaps, minlength=9)[1:] / 20_000, weights / weights.sum(), atol=0.01)


def test_random_words_are_uniform_and_distinct_where_they_must_be() -> None:
    words = RandomWords(3, 1)
    np.testing.assert_allclose(np.bincount(words.below(7, 70_000)) / 10_000, 1, atol=0.05)
    rows = words.distinct(9, 4, 500)
    assert all(len(set(row)) == 4 for row in rows.tolist())
    assert abs(words.unit(10_000).mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("copy", {"symbols": 1}, "symbols must be at least 2, got 1"),
        ("copy", {"shortest": 7}, "expected 1 <= shortest <= longest, got shortest=7, longest=6"),
        (
            "copy",
            {"longest": 16},
            "longest=16 symbols and the end token are longer than max_length=16",
        ),
        ("duplicate", {"symbols": 1}, "symbols must be at least 2, got 1"),
        ("duplicate", {"max_length": 7}, "0 w 0 w has an even number of tokens, at least 4, got max_length=7"),
        ("mqar", {"vocabulary": 7}, "vocabulary must be even and at least 4, got 7"),
        ("mqar", {"pairs": 10}, "pairs must be from 1 to 9, the number of keys in a vocabulary of 20, got 10"),
        ("mqar", {"pairs": 5}, "5 pairs .* need max_length of at least 20, got 16"),
        ("mqar", {"power": 0.0}, "power must be positive, got 0.0"),
        ("mqar", {"pears": 2}, "unknown option 'pears'"),
    ],
)
def test_what_makes_no_sense_is_refused(task: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(task, **changes)


def test_a_parameter_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="symbols"):
        load_task("copy").prepare(Path("unused"), replace(preset("copy"), generator={}))


@pytest.mark.parametrize("task", OPTIONS)
def test_files_are_refused_where_none_are_read(task: str) -> None:
    with pytest.raises(ValueError, match=f"{task!r} draws its examples from a seed and reads no files, got somewh"):
        load_task(task).read(Path("somewhere"), preset(task))


def rows(split: LanguageSplit) -> list[tuple[list[int], list[int]]]:
    assert split.labels is not None
    labels = np.split(split.labels, split.inputs.offsets[1:-1])
    return [(tokens.tolist(), asked.tolist()) for tokens, asked in zip(split.inputs, labels, strict=True)]
