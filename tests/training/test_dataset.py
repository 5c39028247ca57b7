import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_data import labelled

from subquad.training.dataset import BEFORE, Collator, SplitDataset, padded
from subquad.training.order import SortedOrder

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(LENGTHS)
def test_a_batch_holds_each_example_followed_by_padding(lengths: list[int]) -> None:
    examples = [{"input_ids": np.full(length, length), "labels": np.asarray(length)} for length in lengths]
    batch = Collator({"input_ids": 77})(examples)
    assert batch["labels"].tolist() == lengths
    for row, length in zip(batch["input_ids"].tolist(), lengths, strict=True):
        assert row == [length] * length + [77] * (max(lengths) - length)
    if len(set(lengths)) == 1:
        assert "attention_mask" not in batch
    else:
        assert batch["attention_mask"].sum(dim=1).tolist() == lengths
        assert torch.equal(batch["attention_mask"] == 1, batch["input_ids"] != 77)
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_source_and_target_have_masks_of_their_own() -> None:
    examples = [
        {"input_ids": np.zeros(3), "decoder_input_ids": np.zeros(2)},
        {"input_ids": np.zeros(3), "decoder_input_ids": np.zeros(4)},
    ]
    batch = Collator({"input_ids": 1, "decoder_input_ids": 1})(examples)
    assert "attention_mask" not in batch
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_bytes_become_tokens_of_64_bits() -> None:
    rows, mask = padded([np.array([255], dtype=np.uint8), np.array([], dtype=np.uint8)], fill=256)
    assert rows.tolist() == [[255], [256]]
    assert mask is not None
    assert mask.tolist() == [[1], [0]]


def test_a_dataset_follows_its_order() -> None:
    split = labelled(9, 0)
    dataset = SplitDataset(split, SortedOrder(split.lengths), lambda s, visit: {"labels": np.asarray(visit.example)})
    found = [int(dataset[place]["labels"]) for place in range(len(dataset))]
    assert [len(split.inputs[example]) for example in found] == sorted(split.lengths)
    assert dataset[0][BEFORE] == 0
