"""Duplicate: say again a random word, which only exact retrieval can do.

The task on which Reformer shows what hashing costs (Kitaev, Kaiser and Levskaya, "Reformer: The Efficient Transformer",
arXiv 2001.04451, section 2): sequences 0 w 0 w, with w uniform over {1 .. n}^m. In the paper n = 127, m = 511 and the
length is 1024. Asked for is the second w alone, in loss and in score:

    tokens   0 3 1 4 0 3 1 4         m = 3
    labels   . . . . . 3 1 4         "." is nothing

The label at t is to be said at position t - 1, so the model, having read "0 3 1 4 0 3", says 1. Every answer stands
m + 1 places back: a window shorter than that scores one in n. Ids: 0 the separator, 1 .. n the symbols, n + 1 padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from subquad.config import coerce_fields
from subquad.labels import IGNORED
from subquad.tasks.base import DataPreset
from subquad.tasks.generated import Draw, GeneratedTask
from subquad.tasks.identity import identity
from subquad.tasks.kinds import CausalData
from subquad.tasks.random_words import RandomWords
from subquad.tasks.splits import LanguageSplit, Ragged


@dataclass(frozen=True, kw_only=True)
class DuplicateOptions:
    """What the words are made of.

    Attributes:
        symbols: n of the module's formula, at least 2.

    Raises:
        ValueError: for a value of the wrong type or out of range.
    """

    symbols: int

    def __post_init__(self) -> None:
        coerce_fields(self, "generator")
        if self.symbols < 2:
            raise ValueError(f"generator: symbols must be at least 2, got {self.symbols}")


class DuplicateTask(GeneratedTask[LanguageSplit]):
    """0 w 0 w; see the module. All examples are exactly `max_length` long."""

    name: ClassVar[str] = "duplicate"

    def drawing(self, preset: DataPreset) -> Draw[LanguageSplit]:
        """As in `GeneratedTask`."""
        symbols, length = preset.options(DuplicateOptions).symbols, preset.max_length
        if length < 4 or length % 2:
            raise ValueError(
                f"{preset.where}: 0 w 0 w has an even number of tokens, at least 4, got max_length={length}"
            )
        half = length // 2

        def draw(words: RandomWords, count: int) -> LanguageSplit:
            halves = np.zeros((count, 1, half), dtype=np.int32)
            halves[:, 0, 1:] = 1 + words.below(symbols, count, half - 1)
            tokens = np.repeat(halves, 2, axis=1).reshape(count, length)
            labels = tokens.copy()
            labels[:, : half + 1] = IGNORED
            return LanguageSplit(Ragged.from_lengths(tokens.ravel(), np.full(count, length)), labels.ravel())

        return draw

    def gathered(self, preset: DataPreset, splits: dict[str, LanguageSplit]) -> CausalData:
        """As in `GeneratedTask`."""
        symbols = preset.options(DuplicateOptions).symbols
        return CausalData(
            **identity(self.name, preset, splits),
            vocab_size=symbols + 2,
            pad_token_id=symbols + 1,
            max_length=preset.max_length,
            metric="accuracy",
        )
