"""What a task hands to training: ragged token sequences with labels, in three splits, named and hashed.

Examples are stored flat (one array of tokens, one of offsets), because a hundred thousand Python lists of a
thousand tokens cost gigabytes. Padding, batching and tensors are the business of training; nothing here imports torch.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

Progress = Callable[[int, int], None]
"""Called as `progress(done, total)`, both in examples, while data is being generated."""


@dataclass(frozen=True)
class Split:
    """Examples of different lengths, stored flat.

    Attributes:
        tokens: uint8 or int32, (sum of lengths,). Example i is `tokens[offsets[i]:offsets[i + 1]]`.
        offsets: int64, (n + 1,), non-decreasing, from 0 to `len(tokens)`.
        labels: int64, (n,).

    Raises:
        ValueError: if offsets don't cut `tokens` into as many examples as there are labels.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.labels) + 1:
            raise ValueError(
                f"expected one offset more than labels, got {len(self.offsets)} offsets and {len(self.labels)} labels"
            )
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens) or np.any(np.diff(self.offsets) < 0):
            raise ValueError(
                f"expected offsets that rise from 0 to the {len(self.tokens)} tokens there are, "
                f"got {self.offsets[0]} to {self.offsets[-1]}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Tokens (a view, (length,)) and label of one example; negative indices count from the end.

        Raises:
            IndexError: if there is no such example.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of a split of {len(self)}")
        index %= len(self)
        return self.tokens[self.offsets[index] : self.offsets[index + 1]], int(self.labels[index])

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of every example, int64, (n,)."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class TaskData:
    """The examples of a task under one preset, ready for training.

    Attributes:
        name: of the task, such as "listops".
        preset: of the data, such as "quick".
        title: how tables and charts call it; says so when it is not the published benchmark.
        is_lra: whether the examples are those of Long Range Arena (the same distribution, perhaps fewer).
        vocab_size: number of token ids, padding and unknown included.
        pad_token_id: id that no example contains.
        num_labels: labels are 0 .. num_labels - 1.
        max_length: no example is longer, in tokens.
        train: what the model learns from.
        validation: what chooses the checkpoint.
        test: what is reported.
        data_hash: `hash_splits` of the three.
    """

    name: str
    preset: str
    title: str
    is_lra: bool
    vocab_size: int
    pad_token_id: int
    num_labels: int
    max_length: int
    train: Split
    validation: Split
    test: Split
    data_hash: str

    def majority_class(self) -> tuple[int, float]:
        """The label most frequent in train (the smallest of equals) and the share of test that has it."""
        label = int(np.bincount(self.train.labels, minlength=self.num_labels).argmax())
        return label, float(np.mean(self.test.labels == label))


def hash_splits(*splits: Split) -> str:
    """First 12 hex digits of a SHA-256 over lengths, labels and tokens: the same on every machine."""
    digest = hashlib.sha256()
    for split in splits:
        for array in (split.offsets.astype("<i8"), split.labels.astype("<i8"), split.tokens):
            little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(np.ascontiguousarray(little_endian).data)
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class DataPreset:
    """The `[data]` table of a preset: which examples, and how many.

    Attributes:
        name: of the preset, such as "quick"; the file's name without ".toml".
        title: see `TaskData.title`.
        is_lra: see `TaskData.is_lra`.
        train: number of examples.
        validation: number of examples.
        test: number of examples.
        max_length: longest example that the model has to take, in tokens.
        generator: the task's own parameters; the task checks them.
    """

    name: str
    title: str
    is_lra: bool
    train: int
    validation: int
    test: int
    max_length: int
    generator: Mapping[str, int]

    @classmethod
    def from_table(cls, name: str, table: Mapping[str, Any]) -> "DataPreset":
        """Build from a parsed `[data]` table.

        Raises:
            ValueError: for a missing or unknown key, a value of the wrong type, or a count below 1.
        """
        kinds = {"title": str, "is_lra": bool, "generator": dict}
        kinds |= dict.fromkeys(("train", "validation", "test", "max_length"), int)
        if table.keys() != kinds.keys():
            missing, unknown = sorted(kinds.keys() - table.keys()), sorted(table.keys() - kinds.keys())
            raise ValueError(
                f"[data] of preset {name!r}: expected the keys {', '.join(kinds)}; "
                f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
            )
        for key, kind in kinds.items():
            if type(table[key]) is not kind:
                raise ValueError(f"[data] of preset {name!r}: {key} must be {kind.__name__}, got {table[key]!r}")
            if kind is int and table[key] < 1:
                raise ValueError(f"[data] of preset {name!r}: {key} must be at least 1, got {table[key]}")
        return cls(name=name, **table)


class Task(ABC):
    """A source of `TaskData`. Stateless: everything that decides the examples is an argument."""

    name: ClassVar[str]

    @abstractmethod
    def prepare(
        self, directory: Path, preset: DataPreset, *, seed: int = 0, workers: int = 1, progress: Progress | None = None
    ) -> TaskData:
        """Examples of a preset, from `directory` if it holds exactly these, else generated there first.

        Args:
            directory: created if absent.
            preset: which examples, and how many.
            seed: of the generator; the same seed gives the same files whatever the number of workers.
            workers: processes; 1 stays in this one.
            progress: called while generating.

        Raises:
            ValueError: if the preset can't be had, the folder can't be written, or files there are not ours to replace.
        """

    @abstractmethod
    def read(self, directory: Path, preset: DataPreset) -> TaskData:
        """Examples from files in the published layout that the user has; nothing is generated.

        Raises:
            ValueError: if a file is missing or malformed; names file and line.
        """
