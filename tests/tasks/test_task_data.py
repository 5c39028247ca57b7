from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad.tasks.base import DataPreset, Split, TaskData, hash_splits

TABLE: dict[str, Any] = {
    "title": "ListOps",
    "is_lra": True,
    "train": 3,
    "validation": 2,
    "test": 1,
    "max_length": 8,
    "generator": {"max_depth": 3},
}


def make_split(examples: list[list[int]], labels: list[int], dtype: type = np.uint8) -> Split:
    tokens = np.array([token for example in examples for token in example], dtype=dtype)
    return Split(tokens, np.cumsum([0, *map(len, examples)]), np.array(labels, dtype=np.int64))


@given(st.lists(st.tuples(st.lists(st.integers(0, 255), max_size=5), st.integers(0, 9)), max_size=6))
def test_a_split_gives_back_its_examples(examples: list[tuple[list[int], int]]):
    split = make_split([tokens for tokens, _ in examples], [label for _, label in examples])
    assert len(split) == len(examples)
    assert [(tokens.tolist(), label) for tokens, label in map(split.__getitem__, range(len(split)))] == examples
    assert split.lengths.tolist() == [len(tokens) for tokens, _ in examples]
    if examples:
        assert split[-1][0].tolist() == examples[-1][0]


def test_a_split_can_be_iterated_to_its_end():
    assert [label for _, label in make_split([[1], [2, 3]], [4, 5])] == [4, 5]


def test_there_is_no_example_past_the_end():
    for index in (2, -3):
        with pytest.raises(IndexError, match=f"example {index} of a split of 2"):
            make_split([[1], [2]], [0, 0])[index]


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 2], "one offset more than labels, got 2 offsets and 2 labels"),
        ([0, 1, 2], "rise from 0 to the 3 tokens there are, got 0 to 2"),
        ([1, 2, 3], "got 1 to 3"),
        ([0, 4, 3], "got 0 to 3"),
    ],
)
def test_offsets_that_do_not_cut_the_tokens_are_refused(offsets: list[int], message: str):
    with pytest.raises(ValueError, match=message):
        Split(np.zeros(3, dtype=np.uint8), np.array(offsets), np.zeros(2, dtype=np.int64))


def test_the_hash_sees_tokens_cuts_labels_and_order():
    split = make_split([[1, 2], [3]], [0, 1])
    others = [
        make_split([[1, 2], [4]], [0, 1]),
        make_split([[1], [2, 3]], [0, 1]),
        make_split([[1, 2], [3]], [0, 2]),
        make_split([[3], [1, 2]], [1, 0]),
    ]
    assert len({hash_splits(other) for other in [split, *others]}) == 5
    assert hash_splits(split) == hash_splits(make_split([[1, 2], [3]], [0, 1]))
    assert hash_splits(split) == "f5a2c4a0c9a7"


def test_the_hash_does_not_depend_on_byte_order():
    split = make_split([[1, 2], [3]], [0, 1], np.int32)
    swapped = replace(split, tokens=split.tokens.astype(">i4"), offsets=split.offsets.astype(">i8"))
    assert hash_splits(swapped) == hash_splits(split)


def test_the_majority_class_comes_from_train_and_is_scored_on_test():
    data = TaskData(
        name="toy",
        preset="toy",
        title="toy",
        is_lra=False,
        vocab_size=4,
        pad_token_id=0,
        num_labels=10,
        max_length=1,
        train=make_split([[1]] * 5, [7, 2, 2, 7, 1]),
        validation=make_split([[1]], [7]),
        test=make_split([[1]] * 4, [2, 7, 7, 7]),
        data_hash="",
    )
    assert data.majority_class() == (2, 0.25)


def test_a_preset_is_built_from_its_table():
    preset = DataPreset.from_table("toy", TABLE)
    assert (preset.name, preset.train, preset.generator) == ("toy", 3, {"max_depth": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 3}, "of preset 'toy': expected the keys title.*missing: none; unknown: size"),
        ({"train": "many"}, "of preset 'toy': train must be int, got 'many'"),
        ({"train": True}, "train must be int, got True"),
        ({"is_lra": 1}, "is_lra must be bool, got 1"),
        ({"test": 0}, "test must be at least 1, got 0"),
        ({"generator": 4}, "generator must be dict, got 4"),
    ],
)
def test_a_table_that_is_no_preset_is_refused(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        DataPreset.from_table("toy", TABLE | changes)


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match="missing: title; unknown: none"):
        DataPreset.from_table("toy", {key: value for key, value in TABLE.items() if key != "title"})
