"""In which order examples are seen, as a pure function of the place: what makes a resumed run the same run.

An order says for every place 0, 1, 2 ... which example stands there. Batches are consecutive places, so that the state
of the order is the number of the step and nothing else: no random generator has to be saved.

    shuffled   each pass over the data in a new permutation
    stream     B rows of consecutive windows, a batch holding one window of each row:

               place   0    1    2   | 3    4    5   | 6 ...         B = 3 rows, a pass of m windows a row
               window  o  o+m  o+2m  | o+1 o+m+1 ...                 o: where the pass begins, drawn anew
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np


class Visit(NamedTuple):
    """What stands at a place.

    Attributes:
        example: index in the split.
        number: how often the order has gone through the data before; -1 in evaluation.
        before: tokens of the same document that the row of the batch held before it, without a break; 0 where a
            document, or the row, begins.
        asked: False for what only fills a batch up.
    """

    example: int
    number: int
    before: int = 0
    asked: bool = True


class Windows:
    """Consecutive windows of documents.

    Args:
        continues: bool (n,), whether a window goes on where the one before it ended, which the first can't.
        offsets: int (n + 1,), where each begins.
    """

    def __init__(self, continues: np.ndarray, offsets: np.ndarray) -> None:
        self._offsets = offsets
        self._document = np.maximum.accumulate(np.where(continues, 0, np.arange(len(continues))))

    def __len__(self) -> int:
        return len(self._document)

    def before(self, window: int, index: int) -> int:
        """Tokens of the document of a window that its row held before it, as the `index`-th one since it began."""
        return int(self._offsets[window] - self._offsets[max(int(self._document[window]), window - index)])

    def longest(self, stretch: int) -> int:
        """Most tokens from where a document begins, or a stretch of so many windows, to the end of a window."""
        windows = np.arange(len(self))
        begins = np.maximum(self._document, windows - windows % stretch)
        return int((self._offsets[1:] - self._offsets[begins]).max())


class Order(ABC):
    """Places and what stands there."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of places."""

    @abstractmethod
    def __getitem__(self, place: int) -> Visit:
        """What stands at a place."""


class ShuffledOrder(Order):
    """Training: every example once before any comes again, in a permutation of the seed and the pass.

    Args:
        examples: how many there are.
        places: how many are taken.
        seed: of the permutations.
    """

    def __init__(self, examples: int, places: int, seed: int) -> None:
        self._examples, self._places, self._seed = examples, places, seed
        self._number, self._permutation = -1, np.arange(0)

    def __len__(self) -> int:
        return self._places

    def __getitem__(self, place: int) -> Visit:
        """As in `Order`."""
        number, index = divmod(place, self._examples)
        if number != self._number:
            self._permutation = np.random.default_rng((self._seed, number)).permutation(self._examples)
            self._number = number
        return Visit(int(self._permutation[index]), number)


class SortedOrder(Order):
    """Evaluation: every example once, by length, which wastes least padding.

    Args:
        lengths: int (n,), of the examples.
    """

    def __init__(self, lengths: np.ndarray) -> None:
        self._order = np.argsort(lengths, kind="stable")

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> Visit:
        """As in `Order`."""
        return Visit(int(self._order[place]), -1)


class StreamOrder(Order):
    """Training on streams: consecutive windows follow each other in a row of the batch.

    Each pass begins at another window, so that those that don't fill a row are not always the same.

    Args:
        windows: to train on.
        rows: of a batch.
        places: how many are taken.
        seed: of where the passes begin.

    Raises:
        ValueError: fewer windows than rows.
    """

    def __init__(self, windows: Windows, rows: int, places: int, seed: int) -> None:
        if len(windows) < rows:
            raise ValueError(
                f"stream: {rows} rows need at least as many windows to train on, got {len(windows)}; lower batch_size"
            )
        self._windows, self._rows, self._places, self._seed = windows, rows, places, seed

    def __len__(self) -> int:
        return self._places

    def __getitem__(self, place: int) -> Visit:
        """As in `Order`."""
        windows = len(self._windows)
        step, row = divmod(place, self._rows)
        number, index = divmod(step, windows // self._rows)
        begin = int(np.random.default_rng((self._seed, number)).integers(windows))
        window = (begin + row * (windows // self._rows) + index) % windows
        return Visit(window, number, self._windows.before(window, index))


class WholeStreamOrder(Order):
    """Evaluation on streams: every window once, cut into `rows` stretches; places left over ask for nothing.

    Args:
        windows: of the split.
        rows: of a batch, at most.
    """

    def __init__(self, windows: Windows, rows: int) -> None:
        self._windows = windows
        self._rows = min(rows, len(windows))
        self._stretch = -(-len(windows) // self._rows)

    def __len__(self) -> int:
        return self._rows * self._stretch

    @property
    def longest(self) -> int:
        """Most tokens of a document that a row holds without a break."""
        return self._windows.longest(self._stretch)

    def __getitem__(self, place: int) -> Visit:
        """As in `Order`."""
        index, row = divmod(place, self._rows)
        window = row * self._stretch + index
        if window >= len(self._windows):
            return Visit(0, -1, asked=False)
        return Visit(window, -1, self._windows.before(window, index))
