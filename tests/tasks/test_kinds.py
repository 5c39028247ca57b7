import math
from typing import Any

import numpy as np
import pytest

from subquad.labels import IGNORED
from subquad.tasks.kinds import CausalData, ClassificationData, MaskedData, Seq2SeqData
from subquad.tasks.splits import LabelledSplit, LanguageSplit, PairedSplit, Ragged


def ragged(*sequences: list[int]) -> Ragged:
    values = np.array([token for sequence in sequences for token in sequence], dtype=np.int32)
    return Ragged.from_lengths(values, np.array([len(sequence) for sequence in sequences], dtype=np.int64))


def fields(metric: str, train: Any, validation: Any, test: Any, vocab_size: int = 4) -> dict[str, Any]:
    return {
        "name": "toy",
        "preset": "toy",
        "title": "toy",
        "is_lra": False,
        "vocab_size": vocab_size,
        "pad_token_id": 0,
        "max_length": 8,
        "metric": metric,
        "train": train,
        "validation": validation,
        "test": test,
        "data_hash": "",
    }


def labelled(*labels: int) -> LabelledSplit:
    return LabelledSplit(ragged(*([1] for _ in labels)), np.array(labels))


def test_the_majority_class_comes_from_train():
    data = ClassificationData(
        **fields("accuracy", labelled(7, 2, 2, 7, 1), labelled(7), labelled(2, 7, 7, 7)), num_labels=10
    )
    guess = data.guess()
    assert (guess.name, guess.answer) == ("majority_class", "always answers 2")
    assert (guess.validation, guess.test, guess.asked) == (0.0, 0.25, 4)
    assert guess.test_standard_error == pytest.approx(math.sqrt(0.25 * 0.75 / 4))


def test_the_classes_of_a_split_are_counted():
    data = ClassificationData(**fields("accuracy", labelled(1, 1, 0), labelled(1), labelled(1)), num_labels=2)
    assert data.facts() == {"num_labels": 2}
    assert data.split_facts(data.train) == {"labels": {"0": 1, "1": 2}}


def test_the_unigram_guess_codes_what_a_causal_model_is_asked_for():
    train = LanguageSplit(ragged([3, 1, 1, 2]))
    test = LanguageSplit(ragged([3, 1], [0, 2]))
    guess = CausalData(**fields("bits_per_byte", train, LanguageSplit(ragged([1, 3])), test)).guess()
    # Train asks for 1, 1, 2: of four ids, 1 has probability 3 / 7, 2 has 2 / 7, the others 1 / 7.
    assert guess.name == "unigram"
    assert guess.validation == pytest.approx(math.log2(7))
    assert guess.test == pytest.approx((math.log2(7 / 3) + math.log2(7 / 2)) / 2)
    assert guess.test_standard_error == pytest.approx((math.log2(7 / 2) - math.log2(7 / 3)) / 2 / math.sqrt(2))


def test_a_causal_task_with_answers_guesses_the_most_frequent_answer():
    def split(*answers: int) -> LanguageSplit:
        labels = np.array([IGNORED, *answers], dtype=np.int32)
        return LanguageSplit(ragged([0] * len(labels)), labels)

    data = CausalData(**fields("accuracy", split(2, 3, 3, IGNORED), split(3, 1), split(2, 3, 3, 3)))
    guess = data.guess()
    assert (guess.name, guess.answer, guess.validation, guess.test) == ("majority_class", "always answers 3", 0.5, 0.75)
    assert data.split_facts(data.train) == {"asked": 3}


def test_the_unigram_guess_of_masked_text_counts_all_tokens():
    split = LanguageSplit(ragged([1, 1, 2]))
    data = MaskedData(**fields("bits_per_byte", split, split, split), mask_token_id=3, mask_share=0.15)
    assert data.guess().test == pytest.approx((2 * math.log2(7 / 3) + math.log2(7 / 2)) / 3)
    assert "15 % of the tokens" in data.summary()


def test_a_target_is_asked_for_with_its_end():
    split = PairedSplit(ragged([1], [1, 2]), ragged([1, 1], [2]))
    data = Seq2SeqData(**fields("accuracy", split, split, split), start_token_id=2, end_token_id=3)
    guess = data.guess()
    assert (guess.answer, guess.test) == ("always answers 1", 0.4)
    assert data.split_facts(split) == {"shortest_target": 1, "longest_target": 2, "asked": 5}
