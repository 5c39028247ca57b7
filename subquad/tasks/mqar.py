"""Multi-query associative recall (MQAR): keep pairs in memory, and say a key's value when the key comes again.

Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (arXiv 2312.04927), section 3 and
the generator that goes with it. With vocabulary V (even), K pairs and length L:

1. K different keys from 1 .. V/2 - 1 and K different values from V/2 .. V - 1 come first, alternating: 2 K tokens.
2. Each key is asked once, at position 2 K + 2 (g - 1). The gaps g of an example are drawn without replacement from
   1 .. (L - 2 K) // 2, in the order of the pairs, with p(g) proportional to a g^(a - 1); a = 0.01 makes most of them
   short.
3. Everything else is filler: random tokens of the whole vocabulary (`random_filler`, the default), or 0.

With K = 2, filler 0 and gaps 2 and 1 (k, l are keys, v, w their values):

    tokens   k v l w l 0 k 0
    labels   . . . . . w . v         "." is nothing; a query's answer is the label at the next position

The published script has the label where the query stands and shifts it itself; here it stands one later, since the
label at t is to be said at t - 1. The token there is filler and never the answer. Ids: 0 .. V - 1 and V for padding.

What is asked is recall alone: the loss sees no other position. Guessing scores about one in V / 2.
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

_ROWS_AT_ONCE = 2048


@dataclass(frozen=True, kw_only=True)
class MqarOptions:
    """What is to be remembered.

    Attributes:
        vocabulary: V of the module, even.
        pairs: K of the module.
        power: a of the module, positive.
        random_filler: whether the rest is random tokens; else 0.

    Raises:
        ValueError: for a value of the wrong type or out of range.
    """

    vocabulary: int
    pairs: int
    power: float = 0.01
    random_filler: bool = True

    def __post_init__(self) -> None:
        coerce_fields(self, "generator")
        if self.vocabulary < 4 or self.vocabulary % 2:
            raise ValueError(f"generator: vocabulary must be even and at least 4, got {self.vocabulary}")
        if not 1 <= self.pairs < self.vocabulary // 2:
            raise ValueError(
                f"generator: pairs must be from 1 to {self.vocabulary // 2 - 1}, the number of keys in a vocabulary "
                f"of {self.vocabulary}, got {self.pairs}"
            )
        if not 0 < self.power < float("inf"):
            raise ValueError(f"generator: power must be positive, got {self.power}")


class MqarTask(GeneratedTask[LanguageSplit]):
    """Pairs, then queries; see the module. All examples are exactly `max_length` long."""

    name: ClassVar[str] = "mqar"

    def drawing(self, preset: DataPreset) -> Draw[LanguageSplit]:
        """As in `GeneratedTask`."""
        options, length = preset.options(MqarOptions), preset.max_length
        if length < 4 * options.pairs:
            raise ValueError(
                f"{preset.where}: {options.pairs} pairs and as many queries at every other position need max_length "
                f"of at least {4 * options.pairs}, got {length}"
            )

        def draw(words: RandomWords, count: int) -> LanguageSplit:
            starts = range(0, count, _ROWS_AT_ONCE)
            parts = [_draw_rows(words, min(_ROWS_AT_ONCE, count - start), length, options) for start in starts]
            tokens, labels = (np.concatenate(part).ravel() for part in zip(*parts, strict=True))
            return LanguageSplit(Ragged.from_lengths(tokens, np.full(count, length)), labels)

        return draw

    def gathered(self, preset: DataPreset, splits: dict[str, LanguageSplit]) -> CausalData:
        """As in `GeneratedTask`."""
        vocabulary = preset.options(MqarOptions).vocabulary
        return CausalData(
            **identity(self.name, preset, splits),
            vocab_size=vocabulary + 1,
            pad_token_id=vocabulary,
            max_length=preset.max_length,
            metric="accuracy",
        )


def draw_gaps(words: RandomWords, rows: int, largest: int, count: int, power: float) -> np.ndarray:
    """In each row `count` different gaps from 1 to `largest`, in the order drawn; int64, (rows, count).

    Drawing one after the other, each with probability proportional to its weight among those left, is the order in
    which exponential clocks ring whose rates are the weights (Efraimidis and Spirakis, 2006).
    """
    weights = np.arange(1, largest + 1, dtype=np.float64) ** (power - 1)
    rings = -np.log(words.unit(rows, largest)) / weights
    return 1 + np.argsort(rings, axis=1, kind="stable")[:, :count]


def _draw_rows(words: RandomWords, rows: int, length: int, options: MqarOptions) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels, both int32 (rows, length)."""
    half, pairs = options.vocabulary // 2, options.pairs
    keys = 1 + words.distinct(half - 1, pairs, rows)
    values = half + words.distinct(half, pairs, rows)
    queries = 2 * pairs + 2 * (draw_gaps(words, rows, (length - 2 * pairs) // 2, pairs, options.power) - 1)
    tokens = np.zeros((rows, length), dtype=np.int32)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    np.put_along_axis(tokens, queries, keys.astype(np.int32), axis=1)
    labels = np.full((rows, length), IGNORED, dtype=np.int32)
    np.put_along_axis(labels, queries + 1, values.astype(np.int32), axis=1)
    if options.random_filler:
        is_filler = tokens == 0
        tokens[is_filler] = words.below(options.vocabulary, int(is_filler.sum()))
    return tokens, labels
