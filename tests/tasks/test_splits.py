import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad.labels import IGNORED
from subquad.tasks import splits
from subquad.tasks.splits import LabelledSplit, LanguageSplit, PairedSplit, Ragged, count_ids

SEQUENCES = st.lists(st.lists(st.integers(0, 255), max_size=5), max_size=6)


def ragged(sequences: list[list[int]]) -> Ragged:
    values = np.array([token for sequence in sequences for token in sequence], dtype=np.uint8)
    return Ragged.from_lengths(values, np.array([len(sequence) for sequence in sequences], dtype=np.int64))


@given(SEQUENCES)
def test_sequences_come_back_as_they_went_in(sequences: list[list[int]]):
    flat = ragged(sequences)
    assert len(flat) == len(sequences)
    assert [sequence.tolist() for sequence in flat] == sequences
    assert flat.lengths.tolist() == [len(sequence) for sequence in sequences]
    if sequences:
        assert flat[-1].tolist() == sequences[-1]


def test_a_sequence_is_a_view():
    flat = ragged([[1, 2], [3]])
    assert np.shares_memory(flat[0], flat.values)


@pytest.mark.parametrize("index", [2, -3])
def test_there_is_no_sequence_past_the_end(index: int):
    with pytest.raises(IndexError, match=f"example {index} of a split of 2"):
        ragged([[1], [2]])[index]


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([], "got no offsets at all"),
        ([0, 1, 2], "rise from 0 to the 3 tokens there are, got 0 to 2"),
        ([1, 2, 3], "got 1 to 3"),
        ([0, 4, 3], "got 0 to 3"),
    ],
)
def test_offsets_that_do_not_cut_the_tokens_are_refused(offsets: list[int], message: str):
    with pytest.raises(ValueError, match=message):
        Ragged(np.zeros(3, dtype=np.uint8), np.array(offsets, dtype=np.int64))


def test_a_sequence_without_a_label_is_refused():
    with pytest.raises(ValueError, match="one offset more than labels, got 3 offsets and 1 labels"):
        LabelledSplit(ragged([[1], [2]]), np.zeros(1, dtype=np.int64))


def test_a_source_without_a_target_is_refused():
    with pytest.raises(ValueError, match="one target a source, got 2 sources and 1 targets"):
        PairedSplit(ragged([[1], [2]]), ragged([[1]]))


@pytest.mark.parametrize(
    ("labels", "continues", "message"),
    [
        ([IGNORED, 1], None, "one label a token, got 2 labels and 3 tokens"),
        ([IGNORED, 1, 1], None, "label -100 at the first position of every sequence"),
        (None, [False], "one `continues` a sequence, got 1 and 2 sequences"),
        (None, [True, False], "the first sequence can't continue another"),
    ],
)
def test_language_that_does_not_fit_together_is_refused(
    labels: list[int] | None, continues: list[bool] | None, message: str
):
    arrays = (None if part is None else np.array(part) for part in (labels, continues))
    with pytest.raises(ValueError, match=message):
        LanguageSplit(ragged([[5, 6], [7]]), *arrays)


@given(SEQUENCES)
def test_every_token_but_the_first_of_a_sequence_is_asked_for(sequences: list[list[int]]):
    asked = [token for sequence in sequences for token in sequence[1:]]
    expected = np.bincount(np.array(asked, dtype=np.int64), minlength=257)
    assert LanguageSplit(ragged(sequences)).asked_counts(257).tolist() == expected.tolist()


def test_where_labels_are_given_only_these_are_asked_for():
    labels = np.array([IGNORED, 3, IGNORED, 0], dtype=np.int32)
    assert LanguageSplit(ragged([[1, 1, 1, 1]]), labels).asked_counts(4).tolist() == [1, 0, 0, 1]


def test_ids_are_counted_across_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(splits, "_COUNTED_AT_ONCE", 4)
    ids = np.arange(11, dtype=np.uint8) % 3
    assert count_ids(ids, 5).tolist() == [4, 4, 3, 0, 0]
