from typing import Any

import numpy as np
import pytest

from subquad.labels import IGNORED
from subquad.tasks.base import DataPreset, hash_splits
from subquad.tasks.splits import LabelledSplit, LanguageSplit, PairedSplit, Ragged

TABLE: dict[str, Any] = {
    "title": "ListOps",
    "is_lra": True,
    "train": 3,
    "validation": 2,
    "test": 1,
    "max_length": 8,
    "generator": {"max_depth": 3},
}


def make_split(examples: list[list[int]], labels: list[int], dtype: type = np.uint8) -> LabelledSplit:
    tokens = np.array([token for example in examples for token in example], dtype=dtype)
    offsets = np.cumsum([0, *map(len, examples)])
    return LabelledSplit(Ragged(tokens, offsets), np.array(labels, dtype=np.int64))


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
    inputs, labels = split.inputs, split.labels
    swapped = Ragged(inputs.values.astype(">i4"), inputs.offsets.astype(">i8"))
    assert hash_splits(LabelledSplit(swapped, labels.astype(">i8"))) == hash_splits(split)


def test_the_hash_sees_all_that_a_split_holds():
    tokens = make_split([[1, 2], [3]], [0, 0]).inputs
    labels = np.array([IGNORED, 3, IGNORED], dtype=np.int32)
    splits = [
        LanguageSplit(tokens),
        LanguageSplit(tokens, labels),
        LanguageSplit(tokens, labels + np.array([0, 1, 0], dtype=np.int32)),
        LanguageSplit(tokens, continues=np.array([False, True])),
        LanguageSplit(tokens, continues=np.array([False, False])),
        PairedSplit(tokens, tokens),
        PairedSplit(tokens, make_split([[1], [2, 3]], [0, 0]).inputs),
    ]
    assert len({hash_splits(split) for split in splits}) == len(splits)


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
