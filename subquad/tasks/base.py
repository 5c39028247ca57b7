"""What a task is, and what it hands to training: three splits of examples, named and hashed; nothing imports torch."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic

import numpy as np

from subquad.tasks.splits import Split, SplitT

Progress = Callable[[int, int], None]
"""Called as `progress(done, total)`, both in examples, while data is being generated."""


@dataclass(frozen=True)
class Guess:
    """What answering without a model scores: the row that every mechanism has to beat.

    Attributes:
        name: of the guess, which its record has in place of a mechanism's: "majority_class" or "unigram".
        answer: what it does, such as "always answers 3".
        validation: its score on the validation split, in the metric of the task.
        test: its score on the test split.
        test_standard_error: the standard error of `test`, as if the answers asked for didn't depend on each other.
        asked: number of answers asked for in the test split.
    """

    name: str
    answer: str
    validation: float
    test: float
    test_standard_error: float
    asked: int


@dataclass(frozen=True, kw_only=True)
class TaskData(ABC, Generic[SplitT]):
    """The examples of a task under one preset, ready for training. `subquad.tasks.kinds` has its kinds.

    Attributes:
        name: of the task, such as "listops".
        preset: of the data, such as "quick".
        title: how tables and charts call it; says so when it is not the published benchmark.
        is_lra: whether the examples are those of Long Range Arena (the same distribution, perhaps fewer).
        vocab_size: number of token ids, special ones included.
        pad_token_id: id that no example contains.
        max_length: no sequence is longer, in tokens; neither is a target with its end token.
        metric: what is measured: "accuracy", "bits_per_byte" or "bits_per_dimension".
        train: what the model learns from.
        validation: what chooses the checkpoint.
        test: what is reported.
        data_hash: `hash_splits` of the three.
    """

    objective: ClassVar[str]

    name: str
    preset: str
    title: str
    is_lra: bool
    vocab_size: int
    pad_token_id: int
    max_length: int
    metric: str
    train: SplitT
    validation: SplitT
    test: SplitT
    data_hash: str

    @property
    def splits(self) -> dict[str, SplitT]:
        """The three splits by name: train, validation, test."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @abstractmethod
    def guess(self) -> Guess:
        """The best answer that looks at no input."""

    @abstractmethod
    def summary(self) -> str:
        """What is asked of a model, in a few words."""

    def facts(self) -> dict[str, Any]:
        """What this kind of data has beyond the fields above, JSON-ready."""
        return {}

    def split_facts(self, split: SplitT) -> dict[str, Any]:
        """What this kind of data says about a split beyond the lengths of its inputs, JSON-ready."""
        return {}


def hash_splits(*splits: Split) -> str:
    """First 12 hex digits of a SHA-256 over all that the splits hold: the same on every machine."""
    digest = hashlib.sha256()
    for split in splits:
        for array in split.arrays():
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
    ) -> TaskData[Any]:
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
    def read(self, directory: Path, preset: DataPreset) -> TaskData[Any]:
        """Examples from files in the published layout that the user has; nothing is generated.

        Raises:
            ValueError: if a file is missing or malformed; names file and line.
        """
