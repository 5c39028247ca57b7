"""Examples as training takes them: ragged token sequences, stored flat, with what is asked about each.

A hundred thousand Python lists of a thousand tokens cost gigabytes, so examples lie end to end in one array, which may
be a memory map, and a second array says where each begins. Padding, batching and tensors are the business of training.

    values  [ 5 6 7 | 8 | 9 9 ]     offsets [0 3 4 6]     three examples of 3, 1 and 2 tokens
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from subquad.labels import IGNORED

_COUNTED_AT_ONCE = 1 << 24


@dataclass(frozen=True, eq=False)
class Ragged:
    """Sequences of different lengths, stored flat.

    Attributes:
        values: uint8 or int32, (sum of lengths,). Sequence i is `values[offsets[i]:offsets[i + 1]]`.
        offsets: int64, (n + 1,), non-decreasing, from 0 to `len(values)`.

    Raises:
        ValueError: if offsets don't cut `values` from its first to its last.
    """

    values: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.offsets):
            raise ValueError("expected one offset more than sequences, got no offsets at all")
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.values) or np.any(np.diff(self.offsets) < 0):
            raise ValueError(
                f"expected offsets that rise from 0 to the {len(self.values)} tokens there are, "
                f"got {self.offsets[0]} to {self.offsets[-1]}"
            )

    @classmethod
    def from_lengths(cls, values: np.ndarray, lengths: np.ndarray) -> Ragged:
        """Cut `values` into sequences of these lengths, int64 (n,). Raises as the class."""
        return cls(values, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """One sequence, a view (length,); negative indices count from the end.

        Raises:
            IndexError: if there is no such sequence.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of a split of {len(self)}")
        index %= len(self)
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of every sequence, int64, (n,)."""
        return np.diff(self.offsets)

    @property
    def first(self) -> np.ndarray:
        """Where in `values` every sequence that isn't empty begins, int64."""
        return self.offsets[:-1][self.lengths > 0]

    def counts(self, vocab_size: int) -> np.ndarray:
        """How often each id occurs, int64 (vocab_size,)."""
        return count_ids(self.values, vocab_size)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Offsets as int64, and values: what tells two of these apart."""
        return self.offsets.astype(np.int64, copy=False), self.values


class Split(ABC):
    """Examples of one of the three splits.

    Attributes:
        inputs: what the model reads.
    """

    inputs: Ragged

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of every input, int64, (n,)."""
        return self.inputs.lengths

    @abstractmethod
    def arrays(self) -> tuple[np.ndarray, ...]:
        """All that the split holds, as arrays in a fixed order: what its hash sees."""


SplitT = TypeVar("SplitT", bound=Split)


@dataclass(frozen=True, eq=False)
class LabelledSplit(Split):
    """Sequences with one label each, for classification.

    Attributes:
        inputs: the sequences.
        labels: int64, (n,).

    Raises:
        ValueError: if there are more or fewer labels than sequences.
    """

    inputs: Ragged
    labels: np.ndarray

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.inputs):
            raise ValueError(
                f"expected one offset more than labels, got {len(self.inputs.offsets)} offsets and "
                f"{len(self.labels)} labels"
            )

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Offsets, labels, tokens."""
        offsets, tokens = self.inputs.arrays()
        return offsets, self.labels.astype(np.int64, copy=False), tokens


@dataclass(frozen=True, eq=False)
class LanguageSplit(Split):
    """Sequences in which tokens are to be said, for causal and masked language models.

    Attributes:
        inputs: the sequences.
        labels: None where the tokens themselves are asked for; else int32, aligned with `inputs.values`, `IGNORED`
            where nothing is asked. As Hugging Face's causal models have it, the label at t is what must be said at
            position t - 1. It need not be the token at t.
        continues: None, or bool (n,): whether a sequence goes on where the one before it ended, in the same document.

    Raises:
        ValueError: if an array has another length than it should, a first position has a label, or the first
            sequence continues.
    """

    inputs: Ragged
    labels: np.ndarray | None = None
    continues: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.labels is not None:
            if len(self.labels) != len(self.inputs.values):
                raise ValueError(
                    f"expected one label a token, got {len(self.labels)} labels and {len(self.inputs.values)} tokens"
                )
            if np.any(self.labels[self.inputs.first] != IGNORED):
                raise ValueError(
                    f"expected the label {IGNORED} at the first position of every sequence: nothing stands before it "
                    "that could say it"
                )
        if self.continues is not None:
            if len(self.continues) != len(self.inputs):
                raise ValueError(
                    f"expected one `continues` a sequence, got {len(self.continues)} and {len(self.inputs)} sequences"
                )
            if len(self.continues) and self.continues[0]:
                raise ValueError("the first sequence can't continue another")

    def asked_counts(self, vocab_size: int) -> np.ndarray:
        """How often each id is to be said by a causal model, int64 (vocab_size,)."""
        if self.labels is not None:
            return count_ids(self.labels[self.labels != IGNORED], vocab_size)
        return self.inputs.counts(vocab_size) - count_ids(self.inputs.values[self.inputs.first], vocab_size)

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Offsets, tokens, then labels and `continues` where there are any."""
        return (*self.inputs.arrays(), *(array for array in (self.labels, self.continues) if array is not None))


@dataclass(frozen=True, eq=False)
class PairedSplit(Split):
    """Sources and targets, for sequence to sequence.

    Attributes:
        inputs: the sources.
        targets: what is to be said, without start and end tokens.

    Raises:
        ValueError: if there are more or fewer targets than sources.
    """

    inputs: Ragged
    targets: Ragged

    def __post_init__(self) -> None:
        if len(self.targets) != len(self.inputs):
            raise ValueError(
                f"expected one target a source, got {len(self.inputs)} sources and {len(self.targets)} targets"
            )

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Offsets and tokens of the sources, then of the targets."""
        return (*self.inputs.arrays(), *self.targets.arrays())


def count_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id occurs, int64 (vocab_size,); a piece at a time, since numpy widens bytes to count them."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(ids), _COUNTED_AT_ONCE):
        counts += np.bincount(ids[start : start + _COUNTED_AT_ONCE], minlength=vocab_size)
    return counts
