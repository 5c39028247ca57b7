"""What a task is, and what it hands to training: three splits of examples, named and hashed; nothing imports torch."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic

import numpy as np

from subquad.config import Config, make_config
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
        byte_ids: see `SubquadConfig`.
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
    byte_ids: bool = False

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
        generator: the task's own parameters; the task checks them. A task that has none needs no such key.
    """

    name: str
    title: str
    is_lra: bool
    train: int
    validation: int
    test: int
    max_length: int
    generator: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_table(cls, name: str, table: Mapping[str, Any]) -> "DataPreset":
        """Build from a parsed `[data]` table.

        Raises:
            ValueError: for a missing or unknown key, a value of the wrong type, or a count below 1.
        """
        kinds = {"title": str, "is_lra": bool, "generator": dict}
        kinds |= dict.fromkeys(("train", "validation", "test", "max_length"), int)
        missing, unknown = sorted(kinds.keys() - table.keys() - {"generator"}), sorted(table.keys() - kinds.keys())
        if missing or unknown:
            raise ValueError(
                f"[data] of preset {name!r}: expected the keys {', '.join(kinds)}; "
                f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
            )
        for key, value in table.items():
            if type(value) is not kinds[key]:
                raise ValueError(f"[data] of preset {name!r}: {key} must be {kinds[key].__name__}, got {value!r}")
            if kinds[key] is int and value < 1:
                raise ValueError(f"[data] of preset {name!r}: {key} must be at least 1, got {value}")
        return cls(name=name, **table)

    def options(self, config_class: type[Config]) -> Config:
        """The task's own parameters, as its config dataclass, which checks its values.

        Raises:
            ValueError: for an unknown or missing parameter, or what the dataclass refuses.
        """
        return make_config(config_class, f"{self.where}, generator", self.generator)

    @property
    def where(self) -> str:
        """The table, as error messages call it."""
        return f"[data] of preset {self.name!r}"

    @property
    def counts(self) -> dict[str, int]:
        """Number of examples by split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


class Task(ABC):
    """A source of `TaskData`. Stateless: everything that decides the examples is an argument."""

    name: ClassVar[str]
    reads_files: ClassVar[bool] = True
    """Whether `read` takes files of the user's."""
    has_examples: ClassVar[bool] = True
    """Whether `prepare` has examples without them."""

    @abstractmethod
    def prepare(
        self, directory: Path, preset: DataPreset, *, seed: int = 0, workers: int = 1, progress: Progress | None = None
    ) -> TaskData[Any]:
        """Examples of a preset that need no files of the user's.

        A task whose examples take time to make keeps them in `directory` and makes them only if it doesn't hold exactly
        these; the others leave it alone.

        Args:
            directory: created if it is used and absent.
            preset: which examples, and how many.
            seed: of the generator; the same seed gives the same files whatever the number of workers.
            workers: processes; 1 stays in this one.
            progress: called while generating.

        Raises:
            ValueError: if the preset can't be had, the folder can't be written, or files there are not ours to replace.
        """

    @abstractmethod
    def read(self, path: Path, preset: DataPreset) -> TaskData[Any]:
        """Examples from files that the user has, in the layouts that the task's module names; nothing is generated.

        Args:
            path: a folder, or a file where the task takes one.
            preset: gives sizes and limits; the number of examples is whatever the files hold.

        Raises:
            ValueError: if a file is missing or malformed, naming it, or the task has no files.
        """
