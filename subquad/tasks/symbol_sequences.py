"""Random sequences of symbols with a target that depends on them: what `copy` and `reverse` have in common.

Lengths are uniform from `shortest` to `longest`, symbols uniform and independent, so that none can be guessed from its
neighbours: a model has to fetch each from its place. Ids: symbols 0 .. n - 1, padding n, start n + 1, end n + 2.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from subquad.config import coerce_fields
from subquad.tasks.base import DataPreset
from subquad.tasks.generated import Draw, GeneratedTask
from subquad.tasks.identity import identity
from subquad.tasks.kinds import Seq2SeqData
from subquad.tasks.random_words import RandomWords
from subquad.tasks.splits import PairedSplit, Ragged


@dataclass(frozen=True, kw_only=True)
class SequenceOptions:
    """What the sequences are.

    Attributes:
        symbols: how many there are.
        shortest: least number of symbols in a sequence.
        longest: greatest number of symbols in a sequence.

    Raises:
        ValueError: for a value of the wrong type or out of range.
    """

    symbols: int
    shortest: int
    longest: int

    def __post_init__(self) -> None:
        coerce_fields(self, "generator")
        if self.symbols < 2:
            raise ValueError(f"generator: symbols must be at least 2, got {self.symbols}")
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"generator: expected 1 <= shortest <= longest, got shortest={self.shortest}, longest={self.longest}"
            )


class SequenceTask(GeneratedTask[PairedSplit]):
    """A task that maps a random sequence to another."""

    @abstractmethod
    def targets(self, sources: Ragged) -> Ragged:
        """What is to be said for each source."""

    def drawing(self, preset: DataPreset) -> Draw[PairedSplit]:
        """As in `GeneratedTask`."""
        options = preset.options(SequenceOptions)
        if options.longest + 1 > preset.max_length:
            raise ValueError(
                f"{preset.where}: longest={options.longest} symbols and the end token are longer than "
                f"max_length={preset.max_length}: raise max_length to {options.longest + 1} or lower longest"
            )

        def draw(words: RandomWords, count: int) -> PairedSplit:
            lengths = options.shortest + words.below(options.longest - options.shortest + 1, count)
            symbols = words.below(options.symbols, int(lengths.sum())).astype(np.int32)
            sources = Ragged.from_lengths(symbols, lengths)
            return PairedSplit(sources, self.targets(sources))

        return draw

    def gathered(self, preset: DataPreset, splits: dict[str, PairedSplit]) -> Seq2SeqData:
        """As in `GeneratedTask`."""
        symbols = preset.options(SequenceOptions).symbols
        return Seq2SeqData(
            **identity(self.name, preset, splits),
            vocab_size=symbols + 3,
            pad_token_id=symbols,
            start_token_id=symbols + 1,
            end_token_id=symbols + 2,
            max_length=preset.max_length,
            metric="accuracy",
        )
