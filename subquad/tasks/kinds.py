"""The kinds of task data, one for each training objective: what they add to `TaskData`, and what a guess scores.

A guess looks at no input. Where accuracy is measured it always gives the most frequent answer of the training split.
Where bits are measured it codes every token by how frequent it is there, with add-one smoothing, as an order-0 entropy
coder would: p(a) = (count of a + 1) / (count of all + number of ids). A mechanism that does no better has learned
nothing that depends on context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from subquad.tasks.base import Guess, TaskData
from subquad.tasks.splits import LabelledSplit, LanguageSplit, PairedSplit, count_ids

MAJORITY_CLASS = "majority_class"
UNIGRAM = "unigram"


class _Counts(NamedTuple):
    """How often each answer is right, by split; int64 (number of answers,)."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def majority(self) -> Guess:
        """Always the most frequent answer of train (the smallest of equals); scores are accuracies."""
        answer = int(self.train.argmax())
        return self._guess(MAJORITY_CLASS, f"always answers {answer}", (np.arange(len(self.train)) == answer) * 1.0)

    def unigram(self) -> Guess:
        """Every token coded by its frequency in train; scores are bits per token."""
        bits = -np.log2((self.train + 1) / (self.train.sum() + len(self.train)))
        return self._guess(UNIGRAM, "codes each token by its frequency in train", bits)

    def _guess(self, name: str, answer: str, scores: np.ndarray) -> Guess:
        """The guess that scores so much where each of the answers is right, float (number of answers,)."""
        questions = max(int(self.test.sum()), 1)
        validation = float(self.validation @ scores / max(self.validation.sum(), 1))
        test = float(self.test @ scores / questions)
        variance = float(self.test @ (scores - test) ** 2 / questions)
        return Guess(name, answer, validation, test, float(np.sqrt(variance / questions)), questions)


@dataclass(frozen=True, kw_only=True)
class ClassificationData(TaskData[LabelledSplit]):
    """One label a sequence. The metric is accuracy.

    Attributes:
        num_labels: labels are 0 .. num_labels - 1.
    """

    objective: ClassVar[str] = "classification"
    num_labels: int

    def guess(self) -> Guess:
        """The most frequent label."""
        return _Counts(*(count_ids(split.labels, self.num_labels) for split in self.splits.values())).majority()

    def summary(self) -> str:
        """As in `TaskData`."""
        return f"one of {self.num_labels} labels for each sequence"

    def facts(self) -> dict[str, Any]:
        """As in `TaskData`."""
        return {"num_labels": self.num_labels}

    def split_facts(self, split: LabelledSplit) -> dict[str, Any]:
        """How many examples have each label."""
        labels, counts = np.unique(split.labels, return_counts=True)
        return {"labels": {str(label): int(count) for label, count in zip(labels, counts, strict=True)}}


@dataclass(frozen=True, kw_only=True)
class CausalData(TaskData[LanguageSplit]):
    """Each token from those before it, or answers at some positions of a sequence.

    The metric is bits_per_byte or bits_per_dimension (over all positions asked), or accuracy (share of them right).
    """

    objective: ClassVar[str] = "causal_lm"

    def guess(self) -> Guess:
        """The most frequent answer where accuracy is measured, else the unigram code."""
        counts = _Counts(*(split.asked_counts(self.vocab_size) for split in self.splits.values()))
        return counts.majority() if self.metric == "accuracy" else counts.unigram()

    def summary(self) -> str:
        """As in `TaskData`."""
        return "what comes next, from what came before"

    def split_facts(self, split: LanguageSplit) -> dict[str, Any]:
        """How many tokens are asked for."""
        return {"asked": int(split.asked_counts(self.vocab_size).sum())}


@dataclass(frozen=True, kw_only=True)
class MaskedData(TaskData[LanguageSplit]):
    """Masked tokens from those around them. The metric is bits_per_byte over the masked positions.

    Attributes:
        mask_token_id: id that stands for a masked token.
        mask_share: share of the tokens that are masked.
    """

    objective: ClassVar[str] = "masked_lm"
    mask_token_id: int
    mask_share: float

    def guess(self) -> Guess:
        """The unigram code, over all tokens: in expectation, that of the masked ones."""
        return _Counts(*(split.inputs.counts(self.vocab_size) for split in self.splits.values())).unigram()

    def summary(self) -> str:
        """As in `TaskData`."""
        return f"{100 * self.mask_share:g} % of the tokens, masked, from those around them"

    def facts(self) -> dict[str, Any]:
        """As in `TaskData`."""
        return {"mask_token_id": self.mask_token_id, "mask_share": self.mask_share}


@dataclass(frozen=True, kw_only=True)
class Seq2SeqData(TaskData[PairedSplit]):
    """A target from a source. The metric is accuracy: share of target tokens right, given those before, end included.

    Attributes:
        start_token_id: id that the decoder reads first.
        end_token_id: id that ends a target.
    """

    objective: ClassVar[str] = "seq2seq"
    start_token_id: int
    end_token_id: int

    def guess(self) -> Guess:
        """The most frequent target token, the end token among them."""
        return _Counts(*(self._asked_counts(split) for split in self.splits.values())).majority()

    def _asked_counts(self, split: PairedSplit) -> np.ndarray:
        counts = split.targets.counts(self.vocab_size)
        counts[self.end_token_id] += len(split)
        return counts

    def summary(self) -> str:
        """As in `TaskData`."""
        return "a target sequence from a source sequence"

    def facts(self) -> dict[str, Any]:
        """As in `TaskData`."""
        return {"start_token_id": self.start_token_id, "end_token_id": self.end_token_id}

    def split_facts(self, split: PairedSplit) -> dict[str, Any]:
        """Lengths of the targets and how many tokens are asked for."""
        lengths = split.targets.lengths
        return {
            "shortest_target": int(lengths.min()),
            "longest_target": int(lengths.max()),
            "asked": int(lengths.sum()) + len(split),
        }
