import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from subquad.tasks.splits import LabelledSplit, Ragged
from subquad.training.dataset import Collator, SplitDataset


def split_of(lengths: list[int]) -> LabelledSplit:
    """Example i holds i + 1 as often as its length; label i."""
    tokens = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.uint8), lengths)
    return LabelledSplit(Ragged.from_lengths(tokens, np.array(lengths)), np.arange(len(lengths)))


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(LENGTHS)
def test_a_batch_holds_each_example_followed_by_padding(lengths: list[int]) -> None:
    dataset = SplitDataset(split_of(lengths))
    batch = Collator(pad_token_id=0)([dataset[i] for i in range(len(dataset))])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(lengths), max(lengths))
    assert batch["labels"].tolist() == list(range(len(lengths)))
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    expected = torch.arange(1, len(lengths) + 1)[:, None] * batch["attention_mask"]
    assert torch.equal(batch["input_ids"], expected)
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@given(LENGTHS)
def test_ordering_by_length_loses_and_repeats_no_example(lengths: list[int]) -> None:
    ordered = SplitDataset(split_of(lengths), by_length=True)
    examples = [ordered[i] for i in range(len(ordered))]
    assert [len(tokens) for tokens, _ in examples] == sorted(lengths)
    assert sorted(label for _, label in examples) == list(range(len(lengths)))


def test_padding_takes_the_id_it_is_given() -> None:
    dataset = SplitDataset(split_of([1, 3]))
    assert Collator(pad_token_id=7)([dataset[0], dataset[1]])["input_ids"].tolist() == [[1, 7, 7], [2, 2, 2]]
